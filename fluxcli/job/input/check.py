"""Raw rows -> checked `PromptRecord`s. A bad row is a `RowError`, never an exception to the rows around it. The table
of keys in the contract is the table `check_row` reads by."""

import hashlib
import math
import re
from typing import Any, NamedTuple

from fluxcli.core.config import MAX_STEPS, MOST_IMAGES_OF_ROW, RowDefaults
from fluxcli.core.errors import RowError
from fluxcli.core.records import Adapters, PromptRecord
from fluxcli.core.terminal import show
from fluxcli.job.input.adapters import adapters_of
from fluxcli.job.input.keys import NO_COLUMNS, Columns, Schema, schema_of
from fluxcli.models.flux1.family import FLUX1

MAX_SEED = 2**64 - 1  # the largest that torch takes
_EXACT = 2**53  # below it a float that is whole stands for one integer alone
_KEYS_SHOWN = 8
_OF_ONE_IMAGE = frozenset(("id", "seed", "num_images"))

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_SIZE = re.compile(r"\s*([0-9]{1,6})\s*[xX\u00d7]\s*([0-9]{1,6})\s*")


class Checked(NamedTuple):
    """An image to make, by the names of `PromptRecord`: cheaper to make, for a pass over millions of rows."""

    id: str
    prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float | None
    line: int
    adapters: Adapters = ()
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0


def check_row(
    row: dict[str, Any], index: int, line: int, defaults: RowDefaults, columns: Columns = NO_COLUMNS
) -> list[PromptRecord]:
    """The records of `images_of` a row, what is no setting in it as their `meta`."""
    schema = schema_of(row, columns)
    meta = {key: row[key] for key in schema.unknown}
    own = {key for key, name in schema.known if name in _OF_ONE_IMAGE}
    rest = {key: value for key, value in row.items() if key not in own}
    images = images_of(row, schema, index, line, defaults)
    return [
        PromptRecord(
            *image[:-3], meta, adapters=image.adapters, negative_prompt=image.negative_prompt,
            true_cfg_scale=image.true_cfg_scale, row=rest,
        )
        for image in images
    ]  # fmt: skip


def images_of(row: dict[str, Any], schema: Schema, index: int, line: int, defaults: RowDefaults) -> list[Checked]:
    """The images that a row asks for: one, or `num_images` of them under `ID-0`, `ID-1`, ...

    Raises:
        RowError: naming the key, the rule and the value; with the row's id where that is valid.
    """
    given = {name: row[key] for key, name in schema.known}
    id: str | None = None
    try:
        id = default_id(index) if given.get("id") is None else _check_id(given["id"])
        if schema.twice:
            given = _once(row, schema.known)
        prompt = given.get("prompt")
        if not isinstance(prompt, str):
            raise RowError(_missing(row) if prompt is None else f"prompt must be a string, got {show(prompt)}")
        if not prompt.strip():
            raise RowError("prompt is empty")
        width, height, steps = defaults.width, defaults.height, defaults.num_inference_steps
        guidance, copies, seed, adapters = defaults.guidance_scale, defaults.num_images, -1, defaults.adapters
        true_cfg: tuple[str | None, float] = (None, 1.0)
        if len(given) > 1 or defaults.negative_prompt is not None:
            true_cfg = _true_cfg(given, defaults)
        if len(given) > 1:  # most rows of a large job give their prompt alone
            if given.get("size") is not None:
                given |= _size_of(given)
            width = _side("width", given, width)
            height = _side("height", given, height)
            steps = _integer("num_inference_steps", given, 1, MAX_STEPS, steps)
            if refusal := defaults.step_cache.refusal(steps):
                raise RowError(f"num_inference_steps: {refusal}")
            guidance = _guidance(given, guidance)
            copies = _integer("num_images", given, 1, MOST_IMAGES_OF_ROW, copies)
            seed = _seed(given)
            if given.get("lora") is not None:
                adapters = adapters_of(given["lora"], defaults)
        if copies > 1 and len(id) + 1 + len(str(copies - 1)) > 128:
            raise RowError(f"id is too long for num_images: {id}-{copies - 1} has more than 128 characters")
        if seed + copies - 1 > MAX_SEED:
            raise RowError(f"seed must be at most {MAX_SEED}, and it counts up to {seed + copies - 1} over num_images")
    except RowError as error:
        error.id = id
        error.args = (_by_its_key(str(error), row, schema),)
        raise
    if copies == 1:
        own = derived_seed(defaults.seed, id) if seed < 0 else seed
        return [Checked(id, prompt, own, width, height, steps, guidance, line, adapters, *true_cfg)]
    ids = [f"{id}-{copy}" for copy in range(copies)]
    seeds = [derived_seed(defaults.seed, each) if seed < 0 else seed + copy for copy, each in enumerate(ids)]
    return [
        Checked(each, prompt, own, width, height, steps, guidance, line, adapters, *true_cfg)
        for each, own in zip(ids, seeds, strict=True)
    ]


def derived_seed(job_seed: int, id: str, bits: int = 53) -> int:
    """A row's seed from the job's seed and its id alone: the first 53 bits of SHA-256 of "SEED:ID", which every reader
    of JSON keeps."""
    return int.from_bytes(hashlib.sha256(f"{job_seed}:{id}".encode()).digest()[:8], "big") >> (64 - bits)


def default_id(index: int) -> str:
    return f"{index:06d}"


def _once(row: dict[str, Any], known: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """The settings given, where two keys may be the same one: nulls are none."""
    given: dict[str, Any] = {}
    for key, name in known:
        if row[key] is not None:
            if name in given:
                raise RowError(f"{name} is given twice (as {_name(key)} too)")
            given[name] = row[key]
    return given


def _check_id(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        whole = _whole(value)
        value = str(whole) if type(whole) is int else value
    if not isinstance(value, str):
        raise RowError(f"id must be a string or a whole number, got {show(value)}")
    if not _ID.fullmatch(value):
        raise RowError(f"id must be 1 to 128 of A-Z a-z 0-9 . _ - and not start with a dot, got {show(value)}")
    return value


def _true_cfg(given: dict[str, Any], defaults: RowDefaults) -> tuple[str | None, float]:
    """The negative prompt and the scale, as FluxPipeline takes them: (None, 1) without a scale above 1, or without a
    negative prompt, which may be empty."""
    own = given.get("negative_prompt")
    if own is not None and not isinstance(own, str):
        raise RowError(f"negative_prompt must be a string, got {show(own)}")
    if own is not None and own.strip().lower() in ("", "nan"):  # as a spreadsheet has none
        own = ""
    scale = _finite("true_cfg_scale", given.get("true_cfg_scale"), defaults.true_cfg_scale)
    negative = defaults.negative_prompt if own is None else own
    if negative is not None and scale > 1:
        return negative, scale
    if own:
        raise RowError("negative_prompt needs true_cfg_scale above 1; without it, it would change nothing")
    return None, 1.0


def _by_its_key(message: str, row: dict[str, Any], schema: Schema) -> str:
    """A message that begins with a setting, beginning with the key that the row has for it."""
    first, _, rest = message.partition(" ")
    setting = first.rstrip(":")
    keys = {name: key for key, name in reversed(schema.known) if row[key] is not None}
    if setting in keys:
        return f"{_name(keys[setting])}{first[len(setting) :]} {rest}"
    return f"{_name(keys['size'])}: {message}" if setting in ("width", "height") and "size" in keys else message


def _missing(row: dict[str, Any]) -> str:
    keys = [_name(key) for key in row if row[key] is not None]
    if not keys:
        return "prompt is missing: the row is empty"
    more = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
    text = ", ".join(keys[:_KEYS_SHOWN])
    text = text if len(text) <= 100 else text[:97] + "..."
    return f"prompt is missing; the row has {text}{more} (--prompt-column names the one to take)"


def _size_of(given: dict[str, Any]) -> dict[str, int]:
    """Width and height from `size`, which is text like 1024x768; "auto" is nothing given."""
    size = given["size"]
    if isinstance(size, str) and size.strip().lower() in ("", "auto"):
        return {}
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise RowError(f"size must be text like 1024x768, got {show(size)}")
    if both := next((side for side in ("width", "height") if given.get(side) is not None), None):
        raise RowError(f"{both} is given twice (as size too)")
    return {"width": int(match[1]), "height": int(match[2])}


def _whole(value: Any) -> Any:
    """A float that is one integer as that integer."""
    return int(value) if isinstance(value, float) and abs(value) < _EXACT and value.is_integer() else value


def _integer(key: str, given: dict[str, Any], low: int, high: int, default: int) -> int:
    value = _whole(given.get(key))
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError(f"{key} must be an integer, got {show(value)}")
    if not low <= value <= high:
        raise RowError(f"{key} must be {low} to {high}, got {show(value)}")
    return value


def _seed(given: dict[str, Any]) -> int:
    """-1 where none is given, or -1 is, as other programs write it."""
    if _whole(given.get("seed")) == -1:
        return -1
    return _integer("seed", given, 0, MAX_SEED, -1)


def _side(key: str, given: dict[str, Any], default: int) -> int:
    value = _integer(key, given, *FLUX1.sides, default)
    if not FLUX1.draws(value):
        raise RowError(f"{key} must be a multiple of {FLUX1.token_side}, got {value}")
    return value


def _guidance(given: dict[str, Any], default: float | None) -> float | None:
    value = given.get("guidance_scale")
    if value is None:
        return default
    number = _finite("guidance_scale", value, 0.0)
    return None if default is None else number  # a model without a guidance embedding has no use for it


def _finite(key: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"{key} must be a number, got {show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f"{key} must be a finite number")
    return number


def _name(key: str) -> str:
    return show(key)[1:-1]
