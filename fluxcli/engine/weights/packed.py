"""Weights of GGUF files, in blocks of few bits. The package `gguf` says what they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxcli.models.gguf import PACKED
from fluxcli.models.headers import Entry, Header

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] of `kind`, GGUF's name of a type; its bytes [rows, bytes of a row]."""

    kind: str
    data: Any
    columns: int

    def rows(self, start: int, end: int) -> "Packed":
        return Packed(self.kind, self.data[start:end], self.columns)

    def wide(self) -> Tensor:
        """What it stands for, [rows, columns] in float32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(self.data, GGMLQuantizationType[self.kind]))

    def __len__(self) -> int:
        return len(self.data)


class PackedFile:
    """A GGUF file whose head was read and checked, mapped into memory."""

    def __init__(self, path: Path, header: Header) -> None:
        # Copied where it is written to, which nobody does: torch has no tensors that cannot be.
        self._bytes = np.memmap(path, np.uint8, "c")
        self._entries: dict[str, Entry] = {entry.name: entry for entry in header.entries}

    def get_tensor(self, name: str) -> Tensor | Packed:
        entry = self._entries[name]
        data = self._bytes[entry.start : entry.end]
        if entry.dtype in PACKED:
            rows = Packed(entry.dtype, data.reshape(_rows(entry.shape), -1), entry.shape[-1])
            return rows if len(entry.shape) == 2 else rows.wide().reshape(entry.shape)
        return torch.from_numpy(data).view(_PLAIN[entry.dtype]).reshape(entry.shape)


def _rows(shape: Sequence[int]) -> int:
    return int(np.prod(shape[:-1], dtype=np.int64))
