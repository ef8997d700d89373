"""The rows of a job's files as types, with one strict reader and one writer.

A job's directory may come from somebody else or have been through an editor: every value that is read is checked for
its type and range, and keys that are not known here are kept in `extra`, where a row is written again.
"""

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from fluxcli.core.files import json_line

LONGEST_LINE = 64 * 2**20  # bytes: the longest row of an input, every byte of it escaped, and some
ID = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,139}"  # 128 characters, and `-N` for one of several images
SHARD = r"\d{4,6}"  # images/NNNN/, where there are many
SUFFIX = r"(?:png|jpg|webp)"
IMAGE_NAME = re.compile(rf"images/(?:({SHARD})/)?({ID})\.{SUFFIX}")
_DECODE = json.JSONDecoder(parse_constant=lambda name: _refuse(f"{name} is no JSON number")).decode
_SHOWN = 60

Check = Callable[[Any], str | None]  # what a value must be, where it is not


class BadRow(ValueError):
    """A line that is not the row it should be. The message says what is wrong, fit for a terminal."""


def _refuse(message: str) -> Any:
    raise BadRow(message)


def shown(value: Any) -> str:
    """A value from a file, for a message: one short line of plain characters."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if good else f"a whole number from {low} to {high}"

    return check


def _matching(pattern: str, what: str) -> Check:
    match = re.compile(pattern).fullmatch
    return lambda value: None if isinstance(value, str) and match(value) else what


def _of(kinds: type | tuple[type, ...], what: str) -> Check:
    return lambda value: None if isinstance(value, kinds) else what


def _or_null(check: Check) -> Check:
    def either(value: Any) -> str | None:
        wrong = None if value is None else check(value)
        return wrong and f"{wrong} or null"

    return either


def _text(value: Any) -> str | None:
    try:
        return None if isinstance(value, str) and value.encode() is not None else "text"
    except UnicodeEncodeError:
        return "text that UTF-8 can hold"


def _moment(value: Any) -> str | None:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
        good = moment is not None and moment.tzinfo is not None and 1900 < moment.year < 2262  # as a file's time can be
    except ValueError:
        good = False
    return None if good else "a time as 2026-01-01T00:00:00.000Z"


def _guidance(value: Any) -> str | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return None if good else "a number"


def check_adapters(value: Any) -> str | None:
    """What a manifest row's `lora` must be, where it is not."""
    good = isinstance(value, list) and all(
        isinstance(each, dict)
        and isinstance(each.get("path"), str)
        and not _sha256(each.get("sha256"))
        and not _guidance(each.get("scale"))
        for each in value
    )
    return None if good else 'a list of {"path": ..., "sha256": ..., "scale": ...}'


def _error(value: Any) -> str | None:
    good = isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("type", "message"))
    return None if good else 'an object {"type": ..., "message": ...} of texts'


_id = _matching(ID, "an id of letters, digits and ._-")
_name = _matching(IMAGE_NAME.pattern, "images/ID.png, .jpg or .webp, or such a name in images/NNNN/")
_sha256 = _matching(r"[0-9a-f]{64}", "64 hexadecimal digits")
_mask = _matching(r"1[01]*", "a mask of 0 and 1 that begins with 1")
_count, _size = _whole(0, 2**63 - 1), _whole(1, 2**16)
_object, _bool, _number = _of(dict, "an object"), _of(bool, "true or false"), _of((int, float), "a number")


_NULL = object()  # marks a value that is written as null where it is lacking; others are left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Any of them: values with what each must be, and `extra`, the keys that have no field."""

    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def append(self) -> tuple[int, ...]:
        """Equal in rows that one write may have appended; begins with their run."""
        raise NotImplementedError


R = TypeVar("R", bound=Row)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRow(Row):
    """One finished image: manifest.jsonl. In the order of the file."""

    id: Annotated[str, _id]
    prompt: Annotated[str, _text]
    file_name: Annotated[str, _name]
    sha256: Annotated[str, _sha256]
    seed: Annotated[int, _whole(0, 2**64 - 1)]
    width: Annotated[int, _size]
    height: Annotated[int, _size]
    num_inference_steps: Annotated[int, _whole(1, 10**6)]
    guidance_scale: Annotated[float | None, _or_null(_guidance)]
    negative_prompt: Annotated[str | None, _text] = None  # not written without true CFG, as the next
    true_cfg_scale: Annotated[float | None, _guidance] = None
    lora: Annotated[list[Any] | None, check_adapters] = None  # none is not written, as of the next three
    quantization: Annotated[str | None, _text] = None
    step_cache: Annotated[str | None, _mask] = None
    evaluated_steps: Annotated[int | None, _whole(1, 10**6)] = None
    text_tokens: Annotated[int | None, _count] = None
    text_length: Annotated[int | None, _count] = None
    truncated: Annotated[bool | None, _bool] = None
    batch: Annotated[dict[str, Any] | None, _object] = None
    worker: Annotated[int | None, _count] = None
    timing: Annotated[dict[str, Any] | None, _object] = None
    run: Annotated[int, _count]
    finished_at: Annotated[str, _moment]
    meta: Annotated[dict[str, Any] | None, _object] = None

    @property
    def append(self) -> tuple[int, ...]:
        index = (self.batch or {}).get("index")
        return (self.run, index if isinstance(index, int) else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRow(Row):
    """One row that failed, at one attempt: failures.jsonl."""

    id: Annotated[str | None, _or_null(_text)]
    line: Annotated[int, _count]
    error: Annotated[dict[str, Any], _error]
    attempt: Annotated[int, _whole(1, 2**63 - 1)]
    run: Annotated[int, _count]
    row: Annotated[dict[str, Any] | None, _object] = None  # to be given again; a line that was no row has none

    @property
    def append(self) -> tuple[int, ...]:
        return (self.run,)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow(Row):
    """One start: runs.jsonl. `exit_status` is null where the run died."""

    run: Annotated[int, _count]
    host: Annotated[str | None, _text] = None
    device: Annotated[str | None, _text] = None
    dtype: Annotated[str | None, _text] = None
    quantization: Annotated[str | None, _text] = None
    versions: Annotated[dict[str, Any] | None, _object] = None
    argv: Annotated[list[Any] | None, _of(list, "a list")] = None
    input: Annotated[dict[str, Any] | None, _object] = None
    started_at: Annotated[str | None, _text] = None
    finished_at: Annotated[str | None, _text] = None
    planned: Annotated[int | None, _count] = None
    shapes: Annotated[list[str] | None, _of(list, "a list")] = None
    images: Annotated[int | None, _count] = None
    failures: Annotated[int | None, _count] = None
    seconds: Annotated[float | None, _number] = None
    warm_up_s: Annotated[float | None, _number] = None
    stages_s: Annotated[dict[str, Any] | None, _object] = None
    images_per_s: Annotated[float | None, _number] = None
    workers: Annotated[list[Any] | None, _of(list, "a list")] = None
    exit_status: Annotated[int | None, _or_null(_whole(-1000, 1000)), _NULL] = None

    @property
    def append(self) -> tuple[int, ...]:
        return (self.run,)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "RunRow":
        """A row of these values; those that have no field of their own are its `extra`."""
        return make(cls, values)


def read(kind: type[R], line: bytes) -> R:
    """The row of a line, with or without its end.

    Raises:
        BadRow: what is wrong with it.
    """
    return make(kind, read_object(line))


def read_object(data: bytes) -> dict[str, Any]:
    """A JSON object from elsewhere.

    Raises:
        BadRow: it is none, or too deep or too long to take in.
    """
    if len(data) > LONGEST_LINE:
        raise BadRow(f"is longer than {LONGEST_LINE // 2**20} MiB")
    try:
        value = _DECODE(data.decode())
    except BadRow:
        raise
    except UnicodeDecodeError as error:
        raise BadRow("is not UTF-8") from error
    except RecursionError as error:
        raise BadRow("is nested too deeply") from error
    except ValueError as error:
        raise BadRow("is not JSON") from error
    if not isinstance(value, dict):
        raise BadRow(f"must be a JSON object, not {shown(value)}")
    return value


def make(kind: type[R], values: dict[str, Any]) -> R:
    """A row of these values, each checked."""
    known: dict[str, Any] = {}
    for name, column in _columns(kind).items():
        if name in values:
            if wrong := column.check(values[name]):
                raise BadRow(f"{name} must be {wrong}, not {shown(values[name])}")
            known[name] = values[name]
        elif column.required:
            raise BadRow(f"has no {name}")
    row = kind(**known, extra={key: value for key, value in values.items() if key not in known})
    if isinstance(row, ManifestRow) and row.file_name.rpartition("/")[2].rpartition(".")[0] != row.id:
        raise BadRow(f"file_name must be named for the id {row.id}, not {shown(row.file_name)}")
    return row


def write(row: Row) -> bytes:
    """The line of a row."""
    values = {name: getattr(row, name) for name in _columns(type(row))}
    told = {name: value for name, value in values.items() if value is not None or _columns(type(row))[name].null}
    return json_line({**told, **row.extra})


class _Column(NamedTuple):
    check: Check
    required: bool
    null: bool  # written where it is None


_COLUMNS: dict[type, dict[str, _Column]] = {}


def _columns(kind: type[Row]) -> dict[str, _Column]:
    """A row's values in the order of the file."""
    if kind in _COLUMNS:
        return _COLUMNS[kind]
    hints = get_type_hints(kind, include_extras=True)
    columns = {}
    for each in fields(kind):
        if each.name != "extra":
            check, *marks = hints[each.name].__metadata__
            required = each.default is MISSING
            columns[each.name] = _Column(check, required, required or _NULL in marks)
    _COLUMNS[kind] = columns
    return columns
