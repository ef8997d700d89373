"""What the keys of a row mean: the settings by all their spellings, and what looks like one and is none."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

_SETTINGS = (
    *("prompt", "id", "seed", "width", "height", "size"),
    *("num_inference_steps", "guidance_scale", "num_images", "lora"),
    *("negative_prompt", "true_cfg_scale"),
)
_ALIASES = {
    "custom_id": "id",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "n": "num_images",
    "num_images_per_prompt": "num_images",
}
BODY = "body"  # of a request in OpenAI's batch format; its keys are read as "body.prompt" and so on
FAILURE = frozenset(("id", "line", "error", "attempt", "run"))  # the keys of a line of failures.jsonl
_SPELLINGS = {**{name: name for name in _SETTINGS}, **_ALIASES}
_SPELLINGS |= {f"{BODY}.{spelling}": name for spelling, name in _SPELLINGS.items()}
ROW_NAMES = frozenset((*_SPELLINGS, BODY, "meta"))
_FOREIGN_NAMES = """
    cfg cfgscale truecfg distilledcfgscale distilledguidance guidancestrength
    prompt2 negativeprompt2 promptembeds pooledpromptembeds clipskip maxsequencelength
    loras lorascale loraweight loraweights lorapath adapter adapters adapterweights
    sampler samplername samplerindex scheduler sigmas timesteps numsteps numinferencestep inferencesteps samplingsteps
    denoisingsteps w h widthpx heightpx imagewidth imageheight imagesize aspectratio resolution
    image images initimage inputimage imageurl maskimage mask controlimage controlnet ipadapterimage ipadapter
    strength denoise denoisingstrength denoisestrength randomseed noiseseed seeds subseed numoutputs numsamples niter
    batchsize stylepreset hiresfix enablehr outputtype
"""
# Settings of other programs that change an image, without case, blanks, _ and -. Settings of ours so written belong
# here too: numInferenceSteps is none.
_FOREIGN = {*_FOREIGN_NAMES.split(), *(re.sub("[ _-]", "", name) for name in (*_SETTINGS, *_ALIASES) if len(name) > 1)}
# What some of them would be here, so written.
_MEANT_NAMES = {
    "num_inference_steps": "numsteps numinferencestep inferencesteps samplingsteps denoisingsteps",
    "guidance_scale": "distilledcfgscale distilledguidance guidancestrength",
    "seed": "randomseed noiseseed seeds",
    "width": "w widthpx imagewidth",
    "height": "h heightpx imageheight",
    "size": "imagesize resolution",
    "num_images": "numoutputs numsamples niter",
}
_NEAR = 0.83  # of difflib: heigth, sed and promt are; side, guide and ids are not
_MOST_NAMES = 1000  # kept apart when keys are counted
_LONGEST_NAME = 60
_CACHED = 1024  # kinds of rows
_NOTHING = (None, "", False, 0)


class Columns(NamedTuple):
    """Which key is the prompt or the id, where the user named one."""

    prompt: str | None = None
    id: str | None = None


NO_COLUMNS = Columns()


@dataclass(frozen=True, eq=False)
class Schema:
    """One kind of row, by its keys. `known` is (key, setting); `twice` whether two keys are the same setting."""

    known: tuple[tuple[str, str], ...]
    unknown: tuple[str, ...]
    foreign: tuple[str, ...]  # of the unknown
    twice: bool
    has_id: bool
    true_cfg: bool  # whether it has a true_cfg_scale
    small: bool  # enough to be kept: rows of a hostile file may each have keys of their own


def setting_of(key: str, columns: Columns = NO_COLUMNS) -> str | None:
    """The setting that a key names, blanks around it and case ignored; None for one that is none."""
    name = key.strip().lower()
    if columns != NO_COLUMNS:
        for setting, column in zip(("prompt", "id"), columns, strict=True):
            if column is not None and name == column.strip().lower():
                return setting
            if column is not None and _SPELLINGS.get(name) == setting:
                return None
    return _SPELLINGS.get(name)


_schemas: dict[tuple[tuple[str, ...], Columns], Schema] = {}


def schema_of(keys: Iterable[str], columns: Columns = NO_COLUMNS) -> Schema:
    names = tuple(keys)
    found = _schemas.get((names, columns))
    if found is None:
        found = _schema(names, columns)
        if found.small:
            if len(_schemas) >= _CACHED:
                _schemas.clear()
            _schemas[names, columns] = found
    return found


def _schema(names: tuple[str, ...], columns: Columns) -> Schema:
    """A key spelled as the table has it goes before one that differs by case or blanks, which then is unknown."""
    settings = {key: setting_of(key, columns) for key in names}
    exact = {key for key in names if settings[key] and (key in _SPELLINGS or key in columns)}
    taken = {settings[key] for key in exact}
    known = tuple((key, name) for key, name in settings.items() if name and (key in exact or name not in taken))
    unknown = tuple(key for key in names if key not in dict(known))
    foreign = tuple(key for key in unknown if _looks_like_one(key))
    small = len(names) <= 100 and sum(map(len, names)) <= 2000
    names_given = {name for _, name in known}
    return Schema(
        known,
        unknown,
        foreign,
        len(names_given) < len(known),
        "id" in names_given,
        "true_cfg_scale" in names_given,
        small,
    )


def _looks_like_one(key: str) -> bool:
    return _bare(key) in _FOREIGN and key.strip().lower() not in _SPELLINGS


def meant(key: str) -> str | None:
    """The setting that a key which is none may be meant for: misspelt, or another program's name of it."""
    bare, names = _bare(key), _bare_names()
    if bare in names or len(bare) < 3:
        return names.get(bare)
    alike = [name for name in names if name[0] == bare[0] and len(name) > 2]
    turned = [name for name in alike if sorted(name) == sorted(bare)]  # widht
    near = turned or get_close_matches(bare, alike, 1, _NEAR)
    return names[near[0]] if near else None


@cache
def _bare_names() -> dict[str, str]:
    ours = {_bare(name): name for name in (*_SETTINGS, *_ALIASES)}
    return ours | {name: ours_ for ours_, names in _MEANT_NAMES.items() for name in names.split()}


def _bare(key: str) -> str:
    return re.sub(r"[\s_-]", "", key.lower().removeprefix(f"{BODY}."))


def with_body(row: dict[str, Any]) -> dict[str, Any]:
    """A request of OpenAI's batch format with its body's settings beside its own; any other row as it is."""
    body = row.get(BODY)
    if not isinstance(body, dict) or any(setting_of(key) == "prompt" for key in row):
        return row
    lifted = {key for key in body if setting_of(key) or _looks_like_one(key)}
    rest = {key: value for key, value in body.items() if key not in lifted}
    return {**row, BODY: rest, **{f"{BODY}.{key}": body[key] for key in body if key in lifted}}


def asks(key: str, value: Any) -> bool:
    """Whether a foreign setting asks for anything: empty values do not, nor a true_cfg_scale of 1."""
    if isinstance(value, str):
        value = value.strip()
        value = None if value.lower() in ("", "nan", "none", "null", "false") else value
    if value in _NOTHING or value == [] or value == {}:
        return False
    return not ("truecfg" in key.lower().replace("_", "") and str(value) in ("1", "1.0"))


@dataclass
class Tally:
    """How many rows have which keys that are no settings, and what they ask for that is not done."""

    takes_guidance: bool
    _schemas: Counter[Schema] = field(default_factory=Counter)
    _names: Counter[str] = field(default_factory=Counter)
    _asked: Counter[str] = field(default_factory=Counter)

    def add(self, schema: Schema, row: dict[str, Any]) -> None:
        if schema.unknown:
            self._schemas[schema] += 1
            if not schema.small or len(self._schemas) > _CACHED:
                self._names = self.unknown()
                self._schemas.clear()
            for key in schema.foreign:
                if asks(key, row[key]):
                    self.ask(key)
        if not self.takes_guidance:
            for key, name in schema.known:
                if name == "guidance_scale" and row[key] is not None:
                    self.ask(f"{key} (this model takes none)")

    def look_at(self, schema: Schema, row: dict[str, Any], true_cfg: bool) -> None:
        """Takes in what became of a good row that may ask for true CFG."""
        for key, name in schema.known:
            if name == "true_cfg_scale" and not true_cfg and row[key] is not None and float(row[key]) > 1:
                self.ask(f"{key} (no negative_prompt)")

    def ask(self, what: str) -> None:
        _count(self._asked, what, 1)

    def unknown(self) -> Counter[str]:
        """Rows by unknown key; those beyond the first thousand keys together as "others"."""
        names = Counter(self._names)
        for schema, rows in self._schemas.items():
            for key in schema.unknown:
                _count(names, key, rows)
        return names

    def asked(self) -> Counter[str]:
        """Rows by what they ask for that is not done."""
        return Counter(self._asked)


def _count(counts: Counter[str], name: str, rows: int) -> None:
    name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    counts[name if name in counts or len(counts) < _MOST_NAMES else "others"] += rows
