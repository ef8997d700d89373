"""A file of rows that only grows: appended on disk for sure, read strictly, and mended where a crash left its end.

What a crash can damage is the last append that was not yet fsynced, and nothing else: `append` goes no further after
one that failed, and `settle` makes what a killed process left last before it is believed. In such a tail blocks may be
missing: they read as zero bytes, which no row holds, or the file ends early.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic

from fluxcli.core.errors import JobError
from fluxcli.core.files import fsync_directory, open_regular, refuse_irregular, replacing, write_all
from fluxcli.job.output import rows
from fluxcli.job.output.rows import BadRow, R

_BLOCK = 2**20


class RowLog(Generic[R]):
    """One of a job's files of rows.

    Args:
        kind: the type of its rows.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path = path
        self.kind = kind
        self._end: int | None = None  # bytes on disk for sure; None before `settle`
        self._broken: BaseException | None = None

    # Reading

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line that has an end, without it, by its number; the rest of the file is not given. Of a line too long
        to take in, as much as tells so. A file that does not exist yet has none.

        Raises:
            JobError: no plain file lies there.
        """
        try:
            descriptor = open_regular(self.path)
        except FileNotFoundError:
            return
        number, rest = 0, b""
        with open(descriptor, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                if len(rest) > rows.LONGEST_LINE:
                    rest, block = rest[: rows.LONGEST_LINE + 1], block[block.find(b"\n") :] if b"\n" in block else b""
                whole = (rest + block).split(b"\n")
                rest = whole.pop()
                for line in whole:
                    number += 1
                    yield number, line

    def torn(self) -> int:
        """Bytes behind the last line end."""
        try:
            descriptor = open_regular(self.path)
        except FileNotFoundError:
            return 0
        try:
            size = os.fstat(descriptor).st_size
            return size - _last_line(descriptor, size)
        finally:
            os.close(descriptor)

    def parse(self, number: int, line: bytes) -> R:
        """The row of a line.

        Raises:
            JobError: naming file and line and what is wrong.
        """
        try:
            return rows.read(self.kind, line)
        except BadRow as error:
            raise self.bad(number, error) from error

    def bad(self, number: int, error: BadRow) -> JobError:
        return JobError(f"{self.path}, line {number}: {error}; run fluxcli verify --repair")

    def read(self) -> Iterator[tuple[int, R | None]]:
        """Every row by its line's number; None for a line that a crash left unreadable.

        Raises:
            JobError: a line that is not a row, and not for a crash.
        """
        tail = Tail(self)
        for number, line in self.lines():
            if b"\0" in line:
                tail.begin(number)
                yield number, None
                continue
            row = self.parse(number, line)
            tail.go_on(row.append)
            yield number, row

    # Writing

    def settle(self) -> int:
        """Ends the last line or cuts it off, so that rows can be appended; returns the bytes cut off. Whatever a killed
        process wrote here is on disk for sure afterwards."""
        try:
            descriptor = open_regular(self.path, os.O_RDWR)
        except FileNotFoundError:
            self._end = 0
            return 0
        try:
            size = os.fstat(descriptor).st_size
            start = _last_line(descriptor, size)
            cut = 0
            if start < size:
                if size - start <= rows.LONGEST_LINE and self._whole(os.pread(descriptor, size - start, start)):
                    os.lseek(descriptor, 0, os.SEEK_END)
                    write_all(descriptor, b"\n")
                    size += 1
                else:
                    os.ftruncate(descriptor, start)
                    size, cut = start, size - start
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._end = size
        return cut

    def append(self, new: Iterable[R]) -> None:
        """Appends rows in one write, on disk for sure. After one that failed, none is appended any more.

        Raises:
            OSError: the disk's; what was written in part is cut off again, as far as the disk lets.
            JobError: the file is not as this process left it.
        """
        if self._broken is not None:
            raise self._broken
        data = b"".join(map(rows.write, new))
        if not data:
            return
        assert self._end is not None, "settled before it is appended to"
        try:
            descriptor = open_regular(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except BaseException as error:
            self._broken = error
            raise
        try:
            size = os.fstat(descriptor).st_size
            if size != self._end:
                raise JobError(
                    f"{self.path}: changed by another process while this one ran ({self._end} bytes before, now "
                    f"{size}); nothing more is written to it. Run again to go on"
                )
            try:
                write_all(descriptor, data)
                os.fsync(descriptor)
                if not self._end:
                    fsync_directory(self.path.parent)
            except BaseException as error:
                # What the disk holds now nobody knows: no later row may follow upon it.
                self._broken = error
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, self._end)
                    os.fsync(descriptor)
                raise
        finally:
            os.close(descriptor)
        self._end += len(data)

    def rewrite(self, change: Callable[[int, bytes], bytes | None]) -> None:
        """Writes the file anew with what `change` makes of each line: None leaves it out."""
        refuse_irregular(self.path)
        with replacing(self.path) as file:
            for number, line in self.lines():
                if (kept := change(number, line)) is not None:
                    file.write(kept + b"\n")
        self._end = self.path.lstat().st_size

    def _whole(self, line: bytes) -> bool:
        try:
            rows.read(self.kind, line)
            return True
        except BadRow:
            return False


class Tail:
    """Holds the unreadable lines of a log to what a crash can leave: zeros amid the one append that was under way, so
    that every row behind them came with it."""

    def __init__(self, log: "RowLog[Any]") -> None:
        self._log = log
        self._first: int | None = None
        self._append: tuple[int, ...] | None = None

    @property
    def begun(self) -> bool:
        return self._first is not None

    def begin(self, number: int) -> None:
        if self._first is None:
            self._first = number

    def go_on(self, append: tuple[int, ...]) -> None:
        """Takes in a row's `append`; raises JobError where it is of a later one than the unreadable lines before it."""
        if self._first is None:
            return
        if self._append is None:
            self._append = append
        elif append != self._append:
            raise self._log.bad(self._first, BadRow("holds zero bytes, and rows of more than one batch follow"))


def _last_line(descriptor: int, size: int) -> int:
    """Where the text behind the last line end starts: `size`, where nothing is behind it."""
    end = size
    while end > 0:
        start = max(0, end - 2**16)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
