"""job.json: what a job is, told apart from every other job, and what input it was last given."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError
from fluxcli.core.files import open_regular, replacing
from fluxcli.core.terminal import printable, printable_line
from fluxcli.job.output.rows import BadRow, read_object, shown

_LARGEST = 2**20  # bytes


@dataclass(frozen=True)
class Given:
    """An input as a start took it in. `path` is absolute, None for a stream; `sha256` that of its text, unpacked and in
    UTF-8; `images` how many the directory has once all its rows are made, those of other inputs among them."""

    path: str | None
    sha256: str
    rows: int
    images: int

    @classmethod
    def of(cls, value: Any) -> "Given":
        """Raises BadRow: what is wrong with it."""
        given = value if isinstance(value, dict) else {}
        kinds = {"path": str | None, "sha256": str, "rows": int, "images": int}
        wrong = next((name for name, kind in kinds.items() if not isinstance(given.get(name), kind)), None)
        if wrong is not None or given["rows"] < 0 or given["images"] < 0:
            raise BadRow(f"input must be an object with {', '.join(kinds)}, not {shown(value)}")
        return cls(**{name: given[name] for name in kinds})


@dataclass(frozen=True)
class Identity:
    """What fixes the pixels of a whole job: the model, as {"name", "revision", "fingerprint"}, and the options.

    `input` is None in a directory made before inputs were written down; `rest` is what else job.json says.
    """

    model: dict[str, Any]
    options: dict[str, Any]
    input: Given | None = None
    rest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Identity":
        """Raises BadRow: what is wrong with it."""
        rest = dict(values)
        model, options = rest.pop("model", None), rest.pop("options", None)
        for name, value in (("model", model), ("options", options)):
            if not isinstance(value, dict):
                raise BadRow(f"{name} must be an object, not {shown(value)}")
        for name in ("name", "fingerprint"):
            if not isinstance(model.get(name), str):
                raise BadRow(f"model.{name} must be text, not {shown(model.get(name))}")
        if not isinstance(model.get("revision"), str | None):
            raise BadRow(f"model.revision must be text or null, not {shown(model['revision'])}")
        for name, value in options.items():
            if not all(isinstance(one, _SCALAR) for one in (value if isinstance(value, list) else [value])):
                raise BadRow(f"options.{shown(name)} must be a plain value, not {shown(value)}")
        given = Given.of(rest.pop("input")) if "input" in rest else None
        return cls(model, options, given, rest)

    def differences(self, now: "Identity") -> list[str]:
        """Each option that is another now, in words."""
        before, after = self.told(), now.told()
        return [
            f"--{name.replace('_', '-')} was {before.get(name, (None, 'None'))[1]}, "
            f"now {after.get(name, (None, 'None'))[1]}"
            for name in sorted(before.keys() | after.keys())
            if before.get(name, (None,))[0] != after.get(name, (None,))[0]
        ]

    def told(self) -> dict[str, tuple[Any, str]]:
        """The model and each option by name: what is compared of it, and how it is shown."""
        model = self.model
        at = f" at {_plain(model['revision'])}" if model.get("revision") else ""
        name = f"{_plain(model['name'])}{at} (weights {_plain(model['fingerprint'][:8])})"
        told: dict[str, tuple[Any, str]] = {"model": ((model["fingerprint"], model.get("revision")), name)}
        for option, value in {**_UNSAID, **self.options}.items():
            told[_plain(option)] = value, ",".join(map(_plain, value)) if isinstance(value, list) else _plain(value)
        return told


# Options that job.json leaves out, with the value that they have then.
_UNSAID = {
    "quantization": "none", "step_cache": "off", "lora": "none", "negative_prompt": None, "true_cfg_scale": 1.0,
    "num_images": 1,
}  # fmt: skip
_SCALAR = (str, int, float, type(None))


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else shown(value)


def read_identity(directory: Path) -> Identity | None:
    """A directory's job.json, or None where there is none.

    Raises:
        JobError: it is no such file.
    """
    return None if (values := _values(directory)) is None else values[1]


def _values(directory: Path) -> tuple[dict[str, Any], Identity] | None:
    path = directory / "job.json"
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        data = file.read(_LARGEST + 1)
    try:
        if len(data) > _LARGEST:
            raise BadRow("is too large")
        values = read_object(data)
        return values, Identity.of(values)
    except BadRow as error:
        raise JobError(f"{path}: is not a fluxcli job file ({error}); choose another -o") from error


def write_identity(directory: Path, identity: dict[str, Any]) -> None:
    with replacing(directory / "job.json") as file:
        file.write(printable(f"{json.dumps(identity, indent=2, ensure_ascii=False)}\n").encode())


def write_given(directory: Path, given: Given) -> None:
    """Puts the input into job.json, where it says another."""
    values = _values(directory)
    if values is None:
        raise JobError(f"{directory}: its job.json is gone; nothing more is written")
    before = values[1].input
    if before is None or replace(before, path=given.path) != given:  # moved alone it is the same
        write_identity(directory, {**values[0], "input": asdict(given)})


def check_identity(directory: Path, identity: dict[str, Any], input: str | None = None) -> None:
    """Refuses a directory that holds another job, with every difference spelled out, or what is no job; an `input` may
    lie in it.

    Raises:
        JobError: the differences by option name.
    """
    known = read_identity(directory)
    if known is None:
        _refuse_foreign(directory, input)
        return
    if differences := known.differences(Identity.of(identity)):
        raise JobError(
            f"{directory} holds a job with other settings: {'; '.join(differences)}\n"
            "Use the same settings to go on, another -o, or --force to start over in a new directory."
        )


def _refuse_foreign(directory: Path, input: str | None) -> None:
    own = None if input is None else os.path.abspath(input)
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    names = [name for name in names if not name.startswith(".") and name != "lost+found"]
    if names := [name for name in names if os.path.abspath(directory / name) != own]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise JobError(
            f"{directory}: has {printable_line(names[0])}{more} but no job.json, so it is no job; choose another -o"
        )
