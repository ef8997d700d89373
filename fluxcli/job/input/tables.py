"""CSV and TSV: header, delimiter, cells. A row that cannot be read costs no other."""

import csv
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fluxcli.core.errors import InputError, RowError
from fluxcli.core.terminal import printable, show
from fluxcli.job.input.keys import Columns, setting_of
from fluxcli.job.input.raw.encoding import bad_byte
from fluxcli.job.input.raw.lines import MAX_LINE, lines, too_long
from fluxcli.job.input.raw.storage import BLOCK, Bytes

_DELIMITERS = (",", ";", "\t")
_SEPARATOR = re.compile(r'"?sep=([^\w\s"]|\t)"?\s*', re.IGNORECASE)  # as Excel writes it above a header
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE_CELL = re.compile(r'"((?:[^"]|"")*+)"(?=\t|\Z)')
_JOINED = 100  # lines that one cell in quotes may span in TSV


class TableRow(NamedTuple):
    line: int
    offset: int
    text: bytes
    value: dict[str, Any] | RowError


class Table:
    """A table's header, and its rows from any row's offset on."""

    def __init__(self, name: str, file: Bytes, offset: int, tabs: bool, columns: Columns) -> None:
        self._name, self._file = name, file
        feed = _Feed(file, offset)
        first = _line(feed)
        separator = _SEPARATOR.fullmatch(first)
        if separator is None:
            feed.seek(offset, 0)
        start, count = feed.offset, feed.count
        delimiters = ("\t",) if tabs else (separator[1],) if separator else _DELIMITERS
        error = None
        for self._delimiter in delimiters:
            feed.seek(start, count)
            try:
                names = self._header(feed)
            except csv.Error as wrong:
                error = error or wrong
                continue
            if any(setting_of(each, columns) == "prompt" for each in names):
                break
        else:
            if error is not None:
                raise InputError(f"{name}: the header line cannot be read: {error}") from error
            raise InputError(f"{name}: {_no_prompt(first if separator is None else '', columns)}")
        self._keys = [each.strip() or f"column {number}" for number, each in enumerate(names, start=1)]
        self._settings = [setting_of(each, columns) if each.strip() else None for each in names]
        self._blank = [not each.strip() for each in names]
        # Blanks after each comma are no part of the cells, and a quote after one is a quote.
        self._padded = len(names) > 1 and all(each[:1] == " " for each in names[1:])
        self._check_twice()
        self.first_row, self._header_lines = feed.offset, feed.count

    def rows(self, offset: int | None = None, block: int = BLOCK) -> Iterator[TableRow]:
        """Every row from `offset` on, blank ones left out; `line` counts from the file's first where that is None."""
        count = self._header_lines if offset is None else 0
        feed = _Feed(self._file, self.first_row if offset is None else offset, count, block)
        reader = self._reader(feed)
        while True:
            start, line = feed.offset, feed.count + 1
            feed.begin()
            value: dict[str, Any] | RowError
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # An unclosed quote takes in every later line: give them back.
                text = feed.taken[0] if feed.taken else b""
                if feed.after_first is not None:
                    feed.seek(feed.after_first, line)
                reader = self._reader(feed)
                yield TableRow(line, start, text, RowError(f"not a CSV row: {printable(str(error))}"))
                continue
            if not feed.bad and not any(cell.strip(string.whitespace) for cell in cells):
                continue
            try:
                if feed.bad:
                    raise RowError(feed.bad)
                value = self._row(cells)
            except RowError as error:
                value = error
            yield TableRow(line, start, b"".join(feed.taken), value)

    def _row(self, cells: list[str]) -> dict[str, Any]:
        if len(cells) > len(self._keys):
            if any(cell.strip() for cell in cells[len(self._keys) :]):
                raise RowError(f"the row has {len(cells)} columns, the header has {len(self._keys)}")
            cells = cells[: len(self._keys)]
        row: dict[str, Any] = {}
        for key, setting, blank, cell in zip(self._keys, self._settings, self._blank, cells, strict=False):
            if setting is not None:
                row[key] = _typed(setting, cell)
            elif cell or not blank:
                row[key] = cell
        return row

    def _reader(self, feed: "_Feed") -> Iterator[list[str]]:
        if self._delimiter == "\t":
            return _tab_separated(feed, len(self._keys))
        csv.field_size_limit(MAX_LINE)
        return csv.reader(feed, delimiter=self._delimiter, strict=True, skipinitialspace=self._padded)

    def _header(self, feed: "_Feed") -> list[str]:
        self._keys, self._padded = [], False
        feed.begin()
        names = next((cells for cells in self._reader(feed) if any(cells) or feed.bad), [])
        if feed.bad:
            raise InputError(f"{self._name}: the header line cannot be read: {feed.bad}")
        return names

    def _check_twice(self) -> None:
        known = [setting for setting in self._settings if setting is not None]
        for each in (known, [key for key, setting in zip(self._keys, self._settings, strict=True) if not setting]):
            if twice := next((key for key in each if each.count(key) > 1), None):
                raise InputError(f"{self._name}: the header has {show(twice)[1:-1]} twice")


class _Feed:
    """A file's lines as text, with what was taken of them since `begin`."""

    def __init__(self, file: Bytes, offset: int, count: int = 0, block: int = BLOCK) -> None:
        self._file, self._block = file, block
        self.seek(offset, count)
        self.begin()

    def seek(self, offset: int, count: int) -> None:
        """Goes on from the line at `offset`, `count` lines after the first."""
        self.offset, self.count = offset, count
        self._lines = lines(self._file, offset, self._block)

    def begin(self) -> None:
        self.taken: list[bytes] = []
        self._size = 0
        self.bad = ""  # what is wrong with one of them
        self.after_first: int | None = None  # where the second line began

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        _, self.offset, raw = next(self._lines)
        self.count += 1
        if self.after_first is None:
            self.after_first = self.offset
        if raw is None:
            self.bad = too_long()
            return ""
        self._size += len(raw)
        if self._size > 2 * MAX_LINE:
            raise csv.Error("a quote is not closed")
        self.taken.append(raw)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.bad = f"the row is not valid UTF-8: {bad_byte(error)}"
            return raw.decode(errors="replace")


def _tab_separated(feed: _Feed, columns: int) -> Iterator[list[str]]:
    """Cells between tabs. A quote in a cell is a quote; a cell in quotes as a whole, with each quote in it doubled, is
    what other programs make of a cell with a quote, a tab or a line end. Which it is, the header's `columns` tell."""
    for line in feed:
        text = line.rstrip("\r\n")
        if '"' not in text:
            yield text.split("\t")
            continue
        raw = text.split("\t")
        cells, unclosed = _cells(text)
        if unclosed is not None and ("\t" not in text[unclosed:] or len(raw) < columns):
            cells = _joined(feed, line, unclosed, columns) or cells
        elif len(raw) == columns != len(cells):
            cells = raw
        yield cells


def _joined(feed: _Feed, line: str, unclosed: int, columns: int) -> list[str] | None:
    """The cells of a row whose cell in quotes goes on over the next lines; None, and those given back, where it is not
    closed before a line that is a whole row by itself."""
    offset, count, taken, bad = feed.offset, feed.count, len(feed.taken), feed.bad
    for _ in range(_JOINED):
        more = next(feed, None)
        if more is None or (columns > 1 and more.count("\t") + 1 == columns):
            break
        line += more
        if '"' in more and _WHOLE_CELL.match(text := line.rstrip("\r\n"), unclosed):
            cells, again = _cells(text)
            if again is None and len(cells) <= columns:
                return cells
            if again is None:
                break
            unclosed = again
    feed.seek(offset, count)
    del feed.taken[taken:]
    feed.bad = bad
    return None


def _cells(text: str) -> tuple[list[str], int | None]:
    """The cells of a line, those in quotes as a whole without; and where the first starts whose quote is not closed."""
    cells: list[str] = []
    at, unclosed = 0, None
    while True:
        if match := _WHOLE_CELL.match(text, at):
            cells.append(match[1].replace('""', '"'))
            end = match.end()
        else:
            end = text.find("\t", at)
            end = len(text) if end < 0 else end
            if text[at : at + 1] == '"' and unclosed is None:
                unclosed = at
            cells.append(text[at:end])
        if end == len(text):
            return cells, unclosed
        at = end + 1


def _typed(setting: str, cell: str) -> Any:
    """A cell as its setting takes it; None where it is blank."""
    if setting == "prompt":
        return cell
    cell = cell.strip()
    if setting in ("id", "size"):
        return cell or None
    if len(cell) < 100 and _NUMBER.fullmatch(cell):
        return int(cell) if _INTEGER.fullmatch(cell) else float(cell)
    return cell or None


def _line(feed: _Feed) -> str:
    """The first line, blank ones left out; nothing where there is none."""
    return next((text for text in feed if text.strip() or feed.bad), "")


def require_prompt(name: str, header: Sequence[str], columns: Columns) -> None:
    """Raises InputError where no column of a table is the prompt."""
    if not any(setting_of(each, columns) == "prompt" for each in header):
        raise InputError(f"{name}: {_no_prompt(', '.join(header), columns)}")


def _no_prompt(header: str, columns: Columns) -> str:
    wanted = "prompt (or Prompt)" if columns.prompt is None else printable(columns.prompt)
    header = header.strip()
    got = show(header[:200])[1:-1] if header else "none"
    return f"the header needs one column named {wanted}, got {got}" + (
        "" if columns.prompt else " (--prompt-column names the one to take)"
    )
