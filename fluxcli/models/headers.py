"""The head of a weight file: names, dtypes, shapes and places of its tensors, without any of their values. Of
safetensors here; of GGUF by `gguf`."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError
from fluxcli.models import gguf
from fluxcli.models.files import open_regular, parse_json, shown

GGUF = ".gguf"
_MOST = 2**24  # bytes: FLUX.1's largest has 0.2 MB


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor. `dtype` as its kind of file names it; its bytes are `start` to `end` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """`raw` is the head as it stands in the file; `size` the file's bytes."""

    raw: bytes
    size: int
    entries: tuple[Entry, ...]

    def within(self, prefix: str) -> "Header":
        """With the tensors alone whose names begin so, and without that."""
        if not prefix:
            return self
        own = (each for each in self.entries if each.name.startswith(prefix))
        entries = tuple(replace(each, name=each.name.removeprefix(prefix)) for each in own)
        return replace(self, entries=entries)


def read_header(path: Path) -> Header:
    """Reads and checks the head of `path`; no byte of a tensor.

    Raises:
        ModelError: what is wrong with the file: a broken download, a web page, no safetensors at all.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if path.suffix.lower() == GGUF:
            raw, tensors = gguf.read(path, file, size)
            return _whole(path, Header(raw, size, tuple(Entry(*each) for each in tensors)), len(raw))
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8:
            raise ModelError(f"{path}: cannot be read: {size} bytes are no safetensors file; download it again")
        if length > _MOST:
            raise ModelError(f"{path}: cannot be read: {_instead(head)}")
        if length > size - 8:
            raise ModelError(f"{path}: cannot be read: it ends within its header; download it again")
        raw = file.read(length)
    entries = tuple(
        _entry(path, name, about, 8 + length) for name, about in parse_json(raw, path).items() if name != "__metadata__"
    )
    return _whole(path, Header(raw, size, entries), 8 + length)


def _whole(path: Path, header: Header, begin: int) -> Header:
    """`header`, whose tensors begin at `begin`: all within the file."""
    end = max((entry.end for entry in header.entries), default=begin)
    if end > header.size:
        raise ModelError(
            f"{path}: cannot be read: it has {header.size - begin:,} of {end - begin:,} bytes of weights; the download "
            "broke off"
        )
    return header


def _instead(head: bytes) -> str:
    """What begins so, in place of a header's length."""
    if head.lstrip()[:1] == b"<":
        return "it is a web page, not weights; download it again"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "it is a pickle under another name; convert it to safetensors"
    if head[:4] == b"GGUF":
        return "it is a GGUF file under another name; call it .gguf"
    return f"a header of {int.from_bytes(head, 'little'):,} bytes is not that of a safetensors file"


def _entry(path: Path, name: str, about: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, end) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
        if not (
            isinstance(dtype, str)
            and all(type(each) is int and each >= 0 for each in (*shape, start, end))
            and start <= end
        ):
            raise ValueError
    except (LookupError, TypeError, ValueError):
        raise ModelError(f"{path}: cannot be read: its header says nothing sensible of {shown(name)}") from None
    return Entry(name, dtype, shape, base + start, base + end)
