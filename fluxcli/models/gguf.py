"""The head of a GGUF file: names, types, shapes and places of its tensors, each number held to the file's size. What
its values stand for is known to the package `gguf`, in `engine.weights.packed`."""

import math
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from fluxcli.core.errors import ModelError
from fluxcli.models.files import shown

MAGIC = b"GGUF"
# By their numbers in a file: name, values of a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}
UNKNOWN = "of GGUF's type"
PACKED = frozenset(name for name, values, _ in TYPES.values() if values > 1)
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_ALIGNMENT = "general.alignment"
_MOST_HEAD = 2**26  # bytes: FLUX.1's have some 60 KB, those with a vocabulary some MB
_MOST_TENSORS = 2**16
_MOST_DIMENSIONS = 4


class Tensor(NamedTuple):
    """Its bytes are `start` to `end` of the file. `shape` as torch has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def readable() -> bool:
    """Whether the package that reads values is installed."""
    return find_spec("gguf") is not None


def read(path: Path, file: IO[bytes], size: int) -> tuple[bytes, list[Tensor]]:
    """(the head's bytes, its tensors) of an open file of `size` bytes.

    Raises:
        ModelError: what is wrong with it.
    """
    data = file.read(min(size, _MOST_HEAD))
    head = _Head(data)
    try:
        tensors = list(_tensors(head, size))
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        cut = isinstance(error, struct.error) and len(data) == size
        why = "it ends within its header; download it again" if cut else f"no GGUF header: {shown(error)}"
        raise ModelError(f"{path}: cannot be read: {why}") from error
    return data[: head.at], tensors


class _Head:
    """Values one after the other, little-endian."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        length = self.take("Q")
        self.skip(length)
        return self._data[self.at - length : self.at].decode()

    def skip(self, length: int) -> None:
        if length > len(self._data) - self.at:
            raise struct.error("beyond the end")
        self.at += length

    def value(self, kind: int) -> Any:
        """One of the file's settings; of a list nothing, but that it is passed over."""
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            return self.take(_scalar(kind))
        of, count = self.take("I"), self.take("Q")
        if of != _TEXT:
            self.skip(struct.calcsize(_scalar(of)) * count)
            return None
        for _ in range(count):  # each takes 8 bytes at least, so that the file's end is an end
            self.skip(self.take("Q"))
        return None


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a setting of type {kind}")
    return _SCALARS[kind]


def _tensors(head: _Head, size: int) -> Iterator[Tensor]:
    if head.take("4s") != MAGIC or (version := head.take("I")) not in _VERSIONS:
        raise ValueError(f"version {version}" if head.at > len(MAGIC) else "another kind of file")
    count, settings = head.take("Q"), head.take("Q")
    if count > _MOST_TENSORS:
        raise ValueError(f"{count} tensors")
    alignment = 32
    for _ in range(settings):
        name, value = head.text(), head.value(head.take("I"))
        if name == _ALIGNMENT:
            alignment = value
    if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment % 8:
        raise ValueError(f"an alignment of {alignment}")
    about = [_about(head) for _ in range(count)]
    base = head.at + -head.at % alignment
    for name, shape, kind, offset in about:
        dtype, values, bytes_ = TYPES.get(kind, (f"{UNKNOWN} {kind}", 1, 0))
        if offset % alignment:
            raise ValueError(f"{name} lies askew")
        if shape and shape[-1] % values:
            raise ValueError(f"{name} has rows of {shape[-1]} in blocks of {values}")
        end = base + offset + math.prod(shape) // values * bytes_
        yield Tensor(name, dtype, shape, base + offset, end)


def _about(head: _Head) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = head.text(), head.take("I")
    if dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(head.take("Q") for _ in range(dimensions))
    return name, shape[::-1], head.take("I"), head.take("Q")
