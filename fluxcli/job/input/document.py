"""A whole file as one JSON document: an array of rows, or an object of them by id. Read as a stream, a row at a time,
in bounded memory: here only where each row begins and ends is found out, so that a bad row costs no other."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from fluxcli.core.errors import InputError
from fluxcli.job.input.raw.lines import MAX_LINE, count_ends, lines
from fluxcli.job.input.raw.storage import BLOCK, Bytes

_SPACE = re.compile(rb"[ \t\r\n]*+")
_OUTSIDE = re.compile(rb'["\[\]{}]')
_INSIDE = re.compile(rb'["\\]')
_SCALAR_END = re.compile(rb"[,\]}\s]")


class Element(NamedTuple):
    """One row's text, None for a row over MAX_LINE. `line` counts from 1 where reading began; `key` is the row's name
    in an object, as JSON."""

    offset: int
    line: int
    key: bytes | None
    text: bytes | None


class Broken(Exception):
    """The document is not JSON from `line` on, counted from 1 where reading began."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def document_kind(name: str, file: Bytes, offset: int, names: frozenset[str]) -> str | None:
    """ "array" or "object" where the file from `offset` on is one such document, None where each line is a row.

    Args:
        names: keys of a row, which are no ids of rows.

    Raises:
        InputError: one row over several lines, which is neither.
    """
    opening = file.pread(BLOCK, offset).lstrip()[:1]
    if opening not in (b"[", b"{"):
        return None
    first, second = _two_lines(file, offset)
    if second is not None and (first is None or _value(first) is not None):
        return None  # the first line is a whole value or over MAX_LINE, and more follows: each line is a row
    kind = "array" if opening == b"[" else "object"
    try:
        element = next(elements(file, offset, kind), None)
    except Broken:
        return None
    if element is None:
        return "array" if kind == "array" else None
    row = {} if element.text is None else _value(element.text)
    if kind == "array":
        return kind if isinstance(row, dict | str) else None
    is_id = str(_value(element.key or b"")).strip().lower() not in names
    if second is None:
        whole = {} if first is None else _value(first)
        rows = isinstance(whole, dict) and all(isinstance(each, dict) for each in whole.values())
        return kind if is_id and rows and isinstance(row, dict) else None
    if second.startswith(b"{"):
        return None  # a row that is broken off, and the next
    if not is_id or not isinstance(row, dict):
        raise InputError(f"{name}: holds a JSON object over several lines; write each on a line of its own (jq -c .)")
    return kind


def elements(file: Bytes, offset: int, kind: str, inside: bool = False) -> Iterator[Element]:
    """Every row of the document that starts at `offset`; from the row there on, where `inside`.

    Raises:
        Broken: where what comes is neither a row nor the document's end.
    """
    text = _Text(file, offset)
    closing = b"]" if kind == "array" else b"}"
    if not inside:
        text.skip_space()
        text.take(1)
    while True:
        text.skip_space()
        if text.peek() == closing:
            text.take(1)
            text.skip_space()
            if text.peek():
                raise text.broken(f"more follows after the {kind}'s end")
            return
        start, line = text.position, text.line()
        key = None
        if kind == "object":
            if text.peek() != b'"':
                raise text.broken("expected a row's id in quotes")
            key = text.value()
            text.skip_space()
            if text.peek() != b":":
                raise text.broken("expected : after a row's id")
            text.take(1)
            text.skip_space()
        yield Element(start, line, key, text.value())
        text.skip_space()
        if text.peek() == b",":
            text.take(1)
        elif text.peek() != closing:
            raise text.broken(f"expected , or {closing.decode()} after a row")


class _Text:
    """A window on the file that moves forward, and counts the line ends it passes."""

    def __init__(self, file: Bytes, offset: int) -> None:
        self._file = file
        self._data = b""
        self._base = offset  # of _data in the file
        self._at = 0
        self._counted = 0  # up to here line ends are counted
        self._ends = 0

    @property
    def position(self) -> int:
        return self._base + self._at

    def line(self) -> int:
        self._count(self._at)
        return 1 + self._ends

    def broken(self, message: str) -> Broken:
        return Broken(message, self.line())

    def peek(self) -> bytes:
        """The next byte; nothing at the end."""
        if self._at == len(self._data):
            self._more(self.position)
        return self._data[self._at : self._at + 1]

    def take(self, count: int) -> None:
        self._at += count

    def skip_space(self) -> None:
        while True:
            self._at = _SPACE.match(self._data, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._data) or not self._more(self.position):
                return

    def value(self) -> bytes | None:
        """Passes the value that begins here; its text, or None where it is over MAX_LINE."""
        if self.peek() not in (b'"', b"[", b"{"):
            return self._scalar()
        start, long, depth, quoted = self.position, False, 0, False
        while True:
            match = (_INSIDE if quoted else _OUTSIDE).search(self._data, self._at)
            escape = match is not None and match[0] == b"\\"
            if match is None or (escape and match.end() == len(self._data)):
                self._at = len(self._data) if match is None else match.start()
                if self.position - start > MAX_LINE:
                    start, long = self.position, True
                if not self._more(start):
                    raise self.broken("the file ends amid a row")
                continue
            self._at = match.end() + escape
            if match[0] == b'"':
                quoted = not quoted
            elif not escape:
                depth += 1 if match[0] in b"[{" else -1
            if not quoted and not depth:
                return None if long or self.position - start > MAX_LINE else self._since(start)

    def _scalar(self) -> bytes:
        start = self.position
        while (match := _SCALAR_END.search(self._data, self._at)) is None:
            if len(self._data) - self._at > 1000 or not self._more(start):
                raise self.broken("the file ends amid a row")
        self._at = match.start()
        if self.position == start:
            raise self.broken("expected a row")
        return self._since(start)

    def _since(self, start: int) -> bytes:
        return self._data[start - self._base : self._at]

    def _more(self, start: int) -> bool:
        """Reads on, and lets go of what lies before `start` in the file; False at its end."""
        data = self._file.pread(BLOCK, self._base + len(self._data))
        if not data:
            return False
        self._count(start - self._base)
        dropped = min(start - self._base, self._counted)
        self._data = self._data[dropped:] + data
        self._base += dropped
        self._at -= dropped
        self._counted -= dropped
        return True

    def _count(self, end: int) -> None:
        if end > self._counted and self._data[end - 1 : end] == b"\r" and self._data[end : end + 1] in (b"", b"\n"):
            end -= 1  # an LF follows, or may
        self._ends += count_ends(self._data[self._counted : end])
        self._counted = max(self._counted, end)


def _two_lines(file: Bytes, offset: int) -> tuple[bytes | None, bytes | None]:
    """The first line that is not blank, None where it is over MAX_LINE; and the next, None where there is none."""
    two = list(islice(_filled(file, offset), 2))
    return two[0], (two[1] or b"{") if len(two) > 1 else None


def _filled(file: Bytes, offset: int) -> Iterator[bytes | None]:
    return (text and text.strip() for _, _, text in lines(file, offset) if text is None or text.strip())


def _value(text: bytes) -> Any:
    """The JSON value that is the whole of a text, None where it is none."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
