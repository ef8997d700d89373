"""Reading the input: bytes -> raw rows, each once from the front and again by its offset."""

import codecs
import hashlib
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Container, Iterator
from contextlib import closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from fluxcli.core.errors import InputError, RowError
from fluxcli.core.terminal import show
from fluxcli.job.input.document import Broken, Element, document_kind, elements
from fluxcli.job.input.keys import BODY, FAILURE, NO_COLUMNS, ROW_NAMES, Columns, setting_of, with_body
from fluxcli.job.input.raw import archives, encoding, parquet
from fluxcli.job.input.raw.lines import lines, too_long
from fluxcli.job.input.raw.storage import BLOCK, Bytes, Packed, Plain, blocks_in, blocks_of
from fluxcli.job.input.tables import Table, require_prompt

MAX_NESTING = 100  # well below where JSON's own recursion ends, wherever a row is read from
_ONE_ROW = 2**13  # bytes read at first where one row is wanted

Format = Literal["jsonl", "txt", "csv", "tsv"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SUFFIXES: dict[str, Format] = {f".{each}": each for each in FORMATS} | {".ndjson": "jsonl", ".json": "jsonl"}
Value = dict[str, Any] | RowError


class RawRow(NamedTuple):
    """One row as read: `value` is a JSON object's dict, or what was wrong with it.

    `number` counts rows from 0 (blank lines are none), `line` counts lines from 1, `offset` is where it starts in
    bytes, and `digest` a hash of its text, good for this process. `again` marks a failure that is not its row's first.
    """

    number: int
    line: int
    offset: int
    value: Value
    digest: int
    again: bool = False


class PromptFile:
    """An input that can be scanned once from the front and then re-read row by row, so that a job holds offsets rather
    than prompts. What cannot be read twice, standard input ("-") or a pipe, and what has to be unpacked or is not in
    UTF-8 goes into a temporary file first.

    Args:
        path: "-" is standard input; `self.path` is absolute, None for a stream.
        format: of the rows; None goes by the name's suffix, and takes a stream without one for JSONL.

    Raises:
        InputError: it cannot be read or unpacked, is no text, or has no prompts.
    """

    def __init__(self, path: str, format: Format | None = None, columns: Columns = NO_COLUMNS) -> None:
        self.name = "<stdin>" if path == "-" else path
        self.columns = columns
        self.path = None if is_descriptor(path) or _is_stream(path) else os.path.abspath(path)
        self._bytes, parquet_rows = _open(path, self.name, columns)
        try:
            sample = self._bytes.pread(encoding.SAMPLE, 0)
            if mark := encoding.mark_of(sample):
                with closing(self._bytes) as before:
                    self._bytes = _kept(self.name, encoding.as_utf8(self.name, blocks_in(before), *mark))
            else:
                encoding.refuse_foreign(self.name, sample)
            self.format: Format = "jsonl" if parquet_rows else format or _format_of(path)
            if self.format == "txt" and columns != NO_COLUMNS:
                raise InputError(f"{self.name}: has no columns to name: each line of a .txt is a prompt")
            self._start = _after_marks(self._bytes)
            self._document = self._table = None
            if self.format in ("csv", "tsv"):
                self._table = Table(self.name, self._bytes, self._start, self.format == "tsv", columns)
            elif self.format == "jsonl" and not parquet_rows:
                self._document = document_kind(self.name, self._bytes, self._start, ROW_NAMES)
        except OSError as error:
            self._bytes.close()
            raise InputError(f"{self.name}: cannot be read: {error.strerror}") from error
        except BaseException:
            self._bytes.close()
            raise

    def close(self) -> None:
        self._bytes.close()

    @cached_property
    def sha256(self) -> str:
        """Of its text, unpacked and in UTF-8."""
        found = hashlib.sha256()
        for block in blocks_in(self._bytes):
            found.update(block)
        return found.hexdigest()

    def has_id(self, ids: Container[str]) -> bool:
        """Whether a row names one of these as its id."""
        rows = (raw.value for raw in self.scan() if not isinstance(raw.value, RowError))
        return any(str(row[key]) in ids for row in rows for key in row if setting_of(key, self.columns) == "id")

    def scan(self) -> Iterator[RawRow]:
        """Every row of the input, in order.

        Raises:
            InputError: it is one JSON document, and breaks off.
        """
        return self._rows(None, BLOCK)

    def read(self, offset: int, digest: int) -> dict[str, Any]:
        """The row that starts at `offset`, as a scan found it, well formed and with this digest.

        Raises:
            InputError: it is another by now.
        """
        try:
            row = next(self._rows(offset, _ONE_ROW), None)
        except (InputError, OSError):
            row = None
        if row is None or row.offset != offset or row.digest != digest or isinstance(row.value, RowError):
            raise InputError(f"{self.name}: changed while the job was reading it (at byte {offset}); run again")
        return row.value

    def _rows(self, offset: int | None, block: int) -> Iterator[RawRow]:
        """Rows from the one at `offset` on, numbers and lines counted from there; None is the first."""
        if self._table is not None:
            for number, row in enumerate(self._table.rows(offset, block)):
                yield RawRow(number, row.line, row.offset, row.value, hash(row.text))
        elif self._document is not None:
            yield from self._document_rows(self._document, offset)
        else:
            yield from self._line_rows(self._start if offset is None else offset, block)

    def _line_rows(self, offset: int, block: int) -> Iterator[RawRow]:
        number, jsonl, columns = 0, self.format == "jsonl", self.columns
        for line, (start, _, raw) in enumerate(lines(self._bytes, offset, block), start=1):
            if raw is None:
                yield RawRow(number, line, start, RowError(too_long()), 0)
            elif raw.strip():
                value = _json(raw, columns) if jsonl else _text_row(raw)
                again = isinstance(value, _Again)
                yield RawRow(number, line, start, value, hash(raw), again)
            else:
                continue
            number += 1

    def _document_rows(self, kind: str, offset: int | None) -> Iterator[RawRow]:
        start = self._start if offset is None else offset
        try:
            for number, element in enumerate(elements(self._bytes, start, kind, inside=offset is not None)):
                digest = hash((element.key, element.text))
                yield RawRow(number, element.line, element.offset, self._element(element), digest)
        except Broken as error:
            raise InputError(f"{self.name}, line {error.line}: no JSON {kind} of rows from here on: {error}") from error

    def _element(self, element: Element) -> Value:
        if element.text is None:
            return RowError(too_long().replace("line", "row"))
        text = b'{"prompt": %s}' % element.text if element.text.startswith(b'"') else element.text
        value = _json(text, self.columns)
        if element.key is None or isinstance(value, RowError):
            return value
        if any(setting_of(key, self.columns) == "id" for key in value):
            return value
        return _json(b'{"id": %s, %s' % (element.key, text.lstrip()[1:]), self.columns) if value else value


def _open(path: str, name: str, columns: Columns) -> tuple[Bytes, bool]:
    """The input's text, and whether it is the rows of a parquet file."""
    try:
        if path == "-" or not stat.S_ISREG(os.stat(path).st_mode):
            return _stream(path, name), False
        file = open(path, "rb")  # noqa: SIM115 - Plain's to close
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    sample = os.pread(file.fileno(), len(parquet.BEGINNING), 0)
    is_parquet = sample == parquet.BEGINNING or Path(path).suffix.lower() == ".parquet"
    packed = archives.kind_of(sample)
    if not is_parquet and packed is None:
        return Plain(file), False
    with file:
        if is_parquet:
            return _kept(name, parquet.lines_of(name, file, lambda names: require_prompt(name, names, columns))), True
        return _kept(name, archives.unpacked(name, file, str(packed))), False


def _stream(path: str, name: str) -> Bytes:
    if path != "-" and not _is_stream(path):
        raise InputError(f"{name}: is a device or a directory, not a file of rows")
    if path == "-" and sys.stdin is None:
        raise InputError(f"{name}: is closed; give a file, or rows on standard input")
    with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as stream:
        return _kept(name, blocks_of(stream))


def _kept(name: str, blocks: Iterator[bytes]) -> Bytes:
    """Blocks in a temporary file."""
    try:
        return Packed(blocks)
    except OSError as error:
        place = tempfile.gettempdir()
        raise InputError(f"{name}: cannot be read or copied to {place}: {error.strerror}") from error


def _is_stream(path: str) -> bool:
    """Whether a path is a pipe, or names what the process has open already."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or (stat.S_ISCHR(mode) and is_descriptor(path))


def is_descriptor(path: str) -> bool:
    """Whether a path stands for an open file, as /dev/stdin and the shell's <(...) do, and has no name of its own."""
    return path in ("-", "/dev/stdin", "/dev/null") or path.startswith(("/dev/fd/", "/proc/self/fd/"))


def job_name(path: str) -> str:
    """What a job over this input is called."""
    return archives.inner_name(path).stem


def _format_of(path: str) -> Format:
    found = _SUFFIXES.get(archives.inner_name(path).suffix.lower())
    if found is None and (is_descriptor(path) or _is_stream(path)):
        return "jsonl"
    if found is None:
        raise InputError(
            f"{path}: unknown kind of input; use .jsonl, .json, .txt, .csv or .tsv, each also .gz or .zst, .parquet; "
            "--input-format says which where the name does not"
        )
    return found


def _after_marks(file: Bytes) -> int:
    start = 0
    while file.pread(3, start) == codecs.BOM_UTF8:
        start += 3
    return start


def _text_row(raw: bytes) -> Value:
    try:
        return {"prompt": raw.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return RowError(f"the line is not valid UTF-8: {encoding.bad_byte(error)}")


def _json(raw: bytes, columns: Columns) -> Value:
    """A line's object. NaN, Infinity and 1e999, which JSON has not, are null where nothing is made of them."""
    value: Any
    lax = False
    try:
        text = raw.decode().strip(" \t\r\n")
        try:
            value, end = _STRICT.raw_decode(text)
        except _NoNumber:
            value, end = _LAX.raw_decode(text)
            lax = True
    except UnicodeDecodeError as error:
        return RowError(f"the line is not valid UTF-8: {encoding.bad_byte(error)}")
    except json.JSONDecodeError as error:
        return RowError(f"the line is not valid JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return RowError("the line is not valid JSON: nested too deeply")
    except ValueError:
        return RowError("the line is not valid JSON: a number has too many digits")
    if end < len(text):
        return RowError(f"the line is not valid JSON: Extra data (column {end + 1})")
    if not isinstance(value, dict):
        return RowError(f"the line must be a JSON object, got {show(value)}")
    if value.keys() >= FAILURE:
        value = _failed_row(value)
        if isinstance(value, RowError):
            return value
    if len(raw) > 2 * MAX_NESTING and raw.count(b"[") + raw.count(b"{") > MAX_NESTING and _nesting(value) > MAX_NESTING:
        return RowError(f"the row is nested more than {MAX_NESTING} levels deep")
    if b"\\u" in raw and b"\\ud" in raw.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return RowError("the row holds half a surrogate pair, which is no character")
    if BODY in value:
        value = with_body(value)
    if lax:
        value = {key: each if setting_of(key, columns) else finite(each) for key, each in value.items()}
    row: dict[str, Any] = value
    return row


class _Again(dict[str, Any]):
    """The row of a second or later failure."""


def _failed_row(failure: dict[str, Any]) -> Value:
    """The row that a line of failures.jsonl carries."""
    row = failure.get("row")
    if not isinstance(row, dict):
        return RowError("a failure that carries no row: take the row from the input itself")
    return row if failure["attempt"] == 1 else _Again(row)


def _nesting(value: Any) -> int:
    """Levels of objects and arrays, counted without recursion."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return depth


def finite(value: Any) -> Any:
    """The value with null for each number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _NoNumber(Exception):
    pass


def _no_constant(name: str) -> None:
    raise _NoNumber


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NoNumber
    return number


_STRICT, _LAX = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite_float), json.JSONDecoder()
