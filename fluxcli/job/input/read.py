"""Reading the input: bytes -> raw rows -> checked `PromptRecord`s. A bad row is a `RowError`, never an exception to the
rows around it. The table of keys in the contract is the table `check_row` reads by."""

import codecs
import csv
import hashlib
import json
import math
import re
import shutil
import string
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jsonlines

from fluxcli.core.config import MAX_STEPS, RowDefaults
from fluxcli.core.errors import InputError, RowError
from fluxcli.core.records import PromptRecord
from fluxcli.models.flux1.family import FLUX1

MAX_LINE = 10 * 2**20  # bytes
MAX_NESTING = 100  # well below where JSON's own recursion ends, wherever a row is read from
MAX_IMAGES_PER_ROW = 10_000
MAX_SEED = 2**63 - 1

Format = Literal["jsonl", "txt", "csv", "tsv"]

_ALIASES = {
    "custom_id": "id",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "n": "num_images",
    "num_images_per_prompt": "num_images",
}
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_KEYS = frozenset(("prompt", "id", "seed", "width", "height", "num_inference_steps", "guidance_scale", "num_images"))


class RawRow(NamedTuple):
    """One row as read: `value` is a JSON object's dict, or what was wrong with it.

    `number` counts rows from 0 (blank lines are none), `line` counts lines from 1, `offset` is where it starts in
    bytes.
    """

    number: int
    line: int
    offset: int
    value: dict[str, Any] | RowError


class PromptFile:
    """An input file that can be scanned once from the front and then re-read row by row, so that a job holds offsets
    rather than prompts. Standard input ("-") is JSONL and is spooled to a temporary file first."""

    def __init__(self, path: str) -> None:
        self.name = "<stdin>" if path == "-" else path
        self._file: IO[bytes]
        try:
            if path == "-":
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
                shutil.copyfileobj(sys.stdin.buffer, self._file)
                self.format: Format = "jsonl"
            else:
                self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
                self.format = _format_of(path)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {error.strerror}") from error
        self._start = len(codecs.BOM_UTF8) if self._read_at(0, 3) == codecs.BOM_UTF8 else 0
        self._columns: list[str] = []
        self._header_lines = 0
        self._first_row = self._start
        if self.format in ("csv", "tsv"):
            self._read_header()

    def close(self) -> None:
        self._file.close()

    def scan(self) -> Iterator[RawRow]:
        """Every row of the input, in order."""
        for index, (line, offset, value) in enumerate(self._rows(self._first_row)):
            yield RawRow(index, line + self._header_lines, offset, value)

    def read(self, offset: int) -> dict[str, Any]:
        """The row that starts at `offset`, which a scan found to be well formed."""
        _, _, value = next(self._rows(offset))
        if isinstance(value, RowError):
            raise InputError(f"{self.name}: changed while the job was reading it (byte {offset}); run again")
        return value

    def _rows(self, offset: int) -> Iterator[tuple[int, int, dict[str, Any] | RowError]]:
        lines = _Lines(self._file, offset)
        if self.format in ("jsonl", "txt"):
            parse = _json_parser() if self.format == "jsonl" else _parse_text
            for start, raw in lines:
                if raw is None:
                    yield lines.count, start, _too_long()
                elif raw.strip():
                    yield lines.count, start, _or_error(parse, raw)
        else:
            yield from self._table_rows(lines)

    def _table_rows(self, lines: "_Lines") -> Iterator[tuple[int, int, dict[str, Any] | RowError]]:
        reader = self._cells(lines)
        while True:
            start, first_line, too_long = lines.offset, lines.count + 1, lines.too_long
            lines.after_first = None
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield first_line, start, RowError(f"not a CSV row: {error}")
                # An unclosed quote takes in every later line: give them back.
                if lines.after_first is not None:
                    lines.offset, lines.count = lines.after_first, first_line
                reader = self._cells(lines)
                continue
            if lines.too_long > too_long:
                yield first_line, start, _too_long()
            elif any(cell.strip(string.whitespace) for cell in cells):
                yield first_line, start, _or_error(self._parse_cells, cells)

    def _cells(self, lines: "_Lines") -> Iterator[list[str]]:
        return _table_reader(
            ("" if raw is None else raw.decode("utf-8", "surrogateescape") for _, raw in lines), self.format
        )

    def _parse_cells(self, cells: list[str]) -> dict[str, Any]:
        if len(cells) > len(self._columns):
            raise RowError(f"the row has {len(cells)} columns, the header has {len(self._columns)}")
        if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell):
            raise RowError("the row is not valid UTF-8")
        row: dict[str, Any] = {}
        for column, cell in zip(self._columns, cells, strict=False):
            key = "prompt" if column == "Prompt" else column
            canonical = _ALIASES.get(key, key)
            if canonical not in _KEYS:
                row[key] = cell
            elif cell:
                row[key] = _number_from_text(canonical, cell)
        return row

    def _read_header(self) -> None:
        lines = _Lines(self._file, self._start)
        texts = (raw or b"" for _, raw in lines)
        try:
            self._columns = next(_table_reader((raw.decode("utf-8") for raw in texts), self.format), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{self.name}: the header line cannot be read: {error}") from error
        keys = [_ALIASES.get(column, column) for column in self._columns]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise InputError(f"{self.name}: the header has {twice} twice")
        self._first_row, self._header_lines = lines.offset, lines.count
        if sum(column in ("Prompt", "prompt") for column in self._columns) != 1:
            raise InputError(f"{self.name}: the header needs one column named prompt (or Prompt), got {self._columns}")

    def _read_at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


class _Lines:
    """Iterates (offset, line) from `offset`; None stands for a line over MAX_LINE, never held whole."""

    def __init__(self, file: IO[bytes], offset: int) -> None:
        self._file = file
        self.offset = offset
        self.count = 0
        self.too_long = 0
        self.after_first: int | None = None  # offset after the first line since this was last None

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        while True:
            start = self.offset
            if self._file.tell() != start:  # rows read again in between move the file
                self._file.seek(start)
            raw: bytes | None = self._file.readline(MAX_LINE + 1)
            if not raw:
                return
            if len(raw) > MAX_LINE:
                while raw and not raw.endswith(b"\n"):
                    raw = self._file.readline(MAX_LINE)
                raw = None
                self.too_long += 1
                self.offset = self._file.tell()
            else:
                self.offset = start + len(raw)
            self.count += 1
            if self.after_first is None:
                self.after_first = self.offset
            yield start, raw


def _format_of(path: str) -> Format:
    suffix = Path(path).suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "jsonl"
    if suffix in (".txt", ".csv", ".tsv"):
        return suffix[1:]  # type: ignore[return-value]
    raise InputError(f"{path}: unknown kind of input; use .jsonl, .txt, .csv or .tsv, or - for JSONL on standard input")


def _table_reader(lines: Iterator[str], format: Format) -> Iterator[list[str]]:
    if format == "tsv":  # tab-separated values know no quoting: a quote in a prompt is a quote
        return (line.rstrip("\r\n").split("\t") for line in lines)
    csv.field_size_limit(MAX_LINE)
    return csv.reader(lines, strict=True)


def _too_long() -> RowError:
    return RowError(f"the line is longer than {MAX_LINE // 2**20} MiB")


def _or_error(parse: Any, raw: Any) -> dict[str, Any] | RowError:
    try:
        row: dict[str, Any] = parse(raw)
        return row
    except RowError as error:
        return error


def _parse_text(raw: bytes) -> dict[str, Any]:
    try:
        return {"prompt": raw.decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        raise RowError(f"the line is not valid UTF-8: {error.reason} at byte {error.start}") from error


def _json_parser() -> Callable[[bytes], dict[str, Any]]:
    """One reader for all lines of a file; each is handed to it as it comes."""
    line: list[bytes] = []
    reader = jsonlines.Reader(iter(line.pop, None), loads=_strict_loads)

    def parse(raw: bytes) -> dict[str, Any]:
        line.append(raw)
        return _parse_json(raw, reader)

    return parse


def _parse_json(raw: bytes, reader: jsonlines.Reader) -> dict[str, Any]:
    try:
        value = reader.read(allow_none=True)
    except jsonlines.InvalidLineError as error:
        cause = error.__cause__ or error
        raise RowError(
            f"the line is not valid {'UTF-8' if isinstance(cause, UnicodeError) else 'JSON'}: {cause}"
        ) from error
    if not isinstance(value, dict):
        raise RowError(f"the line must be a JSON object, got {_show(value)}")
    if raw.count(b"[") + raw.count(b"{") > MAX_NESTING and _nesting(value) > MAX_NESTING:
        raise RowError(f"the row is nested more than {MAX_NESTING} levels deep")
    if b"\\u" in raw and b"\\ud" in raw.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("the row holds half a surrogate pair, which is no character") from error
    return value


def _nesting(value: Any) -> int:
    """Levels of objects and arrays, counted without recursion."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return depth


def _strict_loads(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is out of range")
    return number


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite_float)


def _number_from_text(key: str, cell: str) -> Any:
    if key in ("prompt", "id"):
        return cell
    if _NUMBER.fullmatch(cell.strip()) and len(cell) < 100:
        return int(cell) if _INTEGER.fullmatch(cell.strip()) else float(cell)
    return cell


def check_row(row: dict[str, Any], index: int, line: int, defaults: RowDefaults) -> list[PromptRecord]:
    """The images that a row asks for: one, or `num_images` of them under `ID-0`, `ID-1`, ...

    Raises:
        RowError: naming the key, the rule and the value; with the row's id where that is valid.
    """
    meta: dict[str, Any] = {}
    given: dict[str, Any] = {}
    id: str | None = _default_id(index)
    try:
        for key, value in row.items():
            canonical = _ALIASES.get(key, key)
            if canonical not in _KEYS:
                meta[key] = value
            elif value is not None:
                if canonical in given:
                    raise RowError(f"{canonical} is given twice (as {key} too)")
                given[canonical] = value
                if canonical == "id":
                    id = None
                    id = _check_id(value)
        if row.get("negative_prompt"):
            raise RowError("negative_prompt is not supported: FLUX.1 is guidance-distilled and would ignore it")
        prompt = given.get("prompt")
        if not isinstance(prompt, str):
            raise RowError("prompt is missing" if prompt is None else f"prompt must be a string, got {_show(prompt)}")
        if not prompt.strip():
            raise RowError("prompt is empty")
        width, height, steps = defaults.width, defaults.height, defaults.num_inference_steps
        guidance, copies, seed = defaults.guidance_scale, 1, -1
        if len(given) > 1:  # most rows of a large job give their prompt alone
            width = _size("width", given, width)
            height = _size("height", given, height)
            steps = _integer("num_inference_steps", given, 1, MAX_STEPS, steps)
            guidance = _guidance(given, guidance)
            copies = _integer("num_images", given, 1, MAX_IMAGES_PER_ROW, copies)
            seed = _integer("seed", given, 0, MAX_SEED, seed)
        assert id is not None
        if copies > 1 and len(id) + 1 + len(str(copies - 1)) > 128:
            raise RowError(f"id is too long for num_images: {id}-{copies - 1} has more than 128 characters")
        if seed + copies - 1 > MAX_SEED:
            raise RowError(f"seed must be at most {MAX_SEED}, and it counts up to {seed + copies - 1} over num_images")
    except RowError as error:
        error.id = id
        raise
    if copies == 1:
        own = derived_seed(defaults.seed, id) if seed < 0 else seed
        return [PromptRecord(id, prompt, own, width, height, steps, guidance, line, meta)]
    ids = [f"{id}-{copy}" for copy in range(copies)]
    seeds = [derived_seed(defaults.seed, each) if seed < 0 else seed + copy for copy, each in enumerate(ids)]
    return [
        PromptRecord(each, prompt, own, width, height, steps, guidance, line, meta)
        for each, own in zip(ids, seeds, strict=True)
    ]


def derived_seed(job_seed: int, id: str) -> int:
    """A row's seed from the job's seed and its id alone: the first 63 bits of SHA-256 of "SEED:ID"."""
    return int.from_bytes(hashlib.sha256(f"{job_seed}:{id}".encode()).digest()[:8], "big") >> 1


def _default_id(index: int) -> str:
    return f"{index:06d}"


def _check_id(value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"id must be a string, got {_show(value)}")
    if not _ID.fullmatch(value):
        raise RowError(f"id must be 1 to 128 of A-Z a-z 0-9 . _ - and not start with a dot, got {_show(value)}")
    return value


def _integer(key: str, given: dict[str, Any], low: int, high: int, default: int) -> int:
    value = given.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError(f"{key} must be an integer, got {_show(value)}")
    if not low <= value <= high:
        raise RowError(f"{key} must be {low} to {high}, got {_show(value)}")
    return value


def _size(key: str, given: dict[str, Any], default: int) -> int:
    value = _integer(key, given, *FLUX1.sides, default)
    if not FLUX1.draws(value):
        raise RowError(f"{key} must be a multiple of {FLUX1.token_side}, got {value}")
    return value


def _guidance(given: dict[str, Any], default: float | None) -> float | None:
    value = given.get("guidance_scale")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"guidance_scale must be a number, got {_show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError("guidance_scale must be a finite number")
    return None if default is None else number  # a model without a guidance embedding has no use for it


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
