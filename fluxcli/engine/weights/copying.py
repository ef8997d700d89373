"""Tensors on the host -> where they belong, by several threads, beside whatever else is loaded meanwhile."""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fluxcli.engine.matmul.scaled import Scaled, Stored, store
from fluxcli.engine.weights.packed import Packed

_READERS = 8  # threads that copy into a GPU's staging memory; one alone is held up by its page faults
PIECE = 2**24  # bytes copied at once: what one reader stages
WIDE = 4  # bytes of a value that was packed

Source = Stored | Packed
Pairs = list[tuple[Stored, Source]]  # (where the values go, where they are)


@contextmanager
def copying(pairs: Pairs) -> Iterator[None]:
    """Copies each (target, source on the host), in pieces, beside the block; done when the block ends. An error or an
    interrupt in the block ends the copying too."""
    pieces = [piece for pair in pairs for piece in zip(*_pieces(*pair), strict=True)]
    device = next((values(target).device for target, _ in pairs if values(target).is_cuda), None)
    staging = _Staging(device, max(_staged(source) for _, source in pieces)) if device else None
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "read") as readers:
        copies = [
            readers.submit(staging.copy if staging and values(target).is_cuda else _copy, target, source)
            for target, source in pieces
        ]
        try:
            yield
            for each in copies:
                each.result()
        finally:
            readers.shutdown(cancel_futures=True)
        if staging:
            staging.synchronize()


def values(tensor: Stored) -> Tensor:
    """Without its scales, where it has some."""
    return tensor if isinstance(tensor, Tensor) else tensor.values


def split(source: Source, lengths: Sequence[int]) -> Sequence[Source]:
    """Its rows, so many for each."""
    if len(lengths) == 1:
        return [source]
    if isinstance(source, Tensor):
        return source.split(list(lengths))
    if isinstance(source, Packed):
        ends = list(accumulate(lengths))
        return [source.rows(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    return [Scaled(*part) for part in zip(*(each.split(list(lengths)) for each in source), strict=True)]


def _pieces(target: Stored, source: Source) -> tuple[Sequence[Stored], Sequence[Source]]:
    """Both cut alike: where either has scales or is packed, between its rows."""
    if isinstance(target, Tensor) and isinstance(source, Tensor):
        length = PIECE // source.element_size()
        return target.view(-1).split(length), source.view(-1).split(length)
    columns = source.columns * WIDE if isinstance(source, Packed) else values(source).shape[-1]
    size = 1 if isinstance(source, Packed) else values(source).element_size()
    whole, rows = len(values(target)), max(1, PIECE // (size * columns))
    lengths = [min(rows, whole - start) for start in range(0, whole, rows)]
    return split(target, lengths), split(source, lengths)  # type: ignore[return-value]


def _staged(source: Source) -> int:
    """Bytes of it on its way."""
    return len(source) * source.columns * WIDE if isinstance(source, Packed) else values(source).nbytes


def _copy(target: Stored, source: Source) -> None:
    if isinstance(source, Packed):
        source = source.wide()
    if isinstance(target, Tensor) and isinstance(source, Tensor) and target.dtype == source.dtype:
        # numpy's copy is one thread's, without the interpreter lock; torch's would start threads of its own.
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        store(target, source)


class _Staging:
    """Copies to a GPU through pinned memory: each thread fills one of its two buffers while the other travels, on a
    stream of its own. From pageable memory the driver would do the same with one thread."""

    def __init__(self, device: torch.device, largest: int) -> None:
        self._device, self._largest = device, largest
        self._own = threading.local()
        self._streams: list[torch.cuda.Stream] = []
        self._built = torch.cuda.Event()  # the targets' memory is theirs from here on
        self._built.record(torch.cuda.current_stream(device))

    def copy(self, target: Stored, source: Source) -> None:
        if isinstance(source, Packed):
            source = source.wide()
        own = self._own
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(self._device)
            own.stream.wait_event(self._built)
            empty = partial(torch.empty, self._largest, dtype=torch.uint8, pin_memory=True)
            own.buffers = [(empty(), torch.cuda.Event()) for _ in "ab"]
            self._streams.append(own.stream)
        own.buffers.reverse()
        buffer, travelled = own.buffers[0]
        travelled.synchronize()
        given = values(source)
        arrived = buffer[: given.nbytes].view(given.dtype).view(given.shape)
        _copy(arrived, given)
        with torch.cuda.stream(own.stream):
            if isinstance(target, Tensor) and isinstance(source, Tensor) and source.dtype == target.dtype:
                target.copy_(arrived, non_blocking=True)
            else:  # converted there
                there: Stored = arrived.to(self._device, non_blocking=True)
                if isinstance(source, Scaled):
                    there = Scaled(values(there), source.scale.to(self._device))
                store(target, there)
            travelled.record(own.stream)

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()
