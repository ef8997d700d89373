"""Where the bytes of an input lie, to be read at any position: in its file as they are, or, of what cannot be read
twice or has to be turned into text first, in a temporary file of our own."""

import os
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from typing import IO, Protocol

BLOCK = 2**20
_PART = 2**16  # bytes that are packed together: what one row costs to be read again


class Bytes(Protocol):
    def pread(self, size: int, offset: int) -> bytes:
        """Bytes from `offset` on: at least one and at most `size` of them, none behind the end. Moves nothing that
        others read by."""
        ...

    def close(self) -> None: ...


class Plain:
    """A file as it is. Closes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        self._file.close()


class Packed:
    """A temporary file that takes `blocks`, compressed part by part: a small archive that unpacks to more than a disk
    holds takes little here too.

    Raises:
        OSError: the temporary file's; and whatever `blocks` raises.
    """

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._starts = array("q", [0])
        self._part: tuple[int, bytes] = -1, b""  # the last one unpacked
        try:
            for part in _parts(blocks):
                self._starts.append(self._starts[-1] + self._file.write(zlib.compress(part, 1)))
            self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def pread(self, size: int, offset: int) -> bytes:
        first, skipped = divmod(offset, _PART)
        found: list[bytes] = []
        wanted = skipped + size
        for number in range(first, min(first - (-wanted // _PART), len(self._starts) - 1)):
            found.append(self._unpacked(number))
        return b"".join(found)[skipped:wanted]

    def close(self) -> None:
        self._file.close()

    def _unpacked(self, number: int) -> bytes:
        last, data = self._part
        if last != number:
            start, end = self._starts[number : number + 2]
            data = zlib.decompress(os.pread(self._file.fileno(), end - start, start))
            self._part = number, data
        return data


def blocks_of(file: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: file.read(BLOCK), b"")


def blocks_in(source: Bytes) -> Iterator[bytes]:
    offset = 0
    while block := source.pread(BLOCK, offset):
        yield block
        offset += len(block)


def _parts(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in parts of `_PART`, the last what is left."""
    rest = b""
    for block in blocks:
        rest += block
        whole = len(rest) - len(rest) % _PART
        for start in range(0, whole, _PART):
            yield rest[start : start + _PART]
        rest = rest[whole:]
    if rest:
        yield rest
