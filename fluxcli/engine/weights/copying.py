"""Tensors on the host -> where they belong, by several threads, beside whatever else is loaded meanwhile."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_READERS = 8  # threads that copy into a GPU's staging memory; one alone is held up by its page faults
PIECE = 2**24  # bytes copied at once: what one reader stages


@contextmanager
def copying(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Copies each (target, source on the host), in pieces, beside the block; done when the block ends. An error or an
    interrupt in the block ends the copying too."""
    pieces = [
        piece
        for target, source in pairs
        for piece in zip(
            *(each.view(-1).split(PIECE // source.element_size()) for each in (target, source)), strict=True
        )
    ]
    device = next((target.device for target, _ in pairs if target.is_cuda), None)
    staging = _Staging(device) if device else None
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "read") as readers:
        copies = [
            readers.submit(staging.copy if staging and target.is_cuda else _copy, target, source)
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


def _copy(target: Tensor, source: Tensor) -> None:
    if target.dtype == source.dtype:
        # numpy's copy is one thread's, without the interpreter lock; torch's would start threads of its own.
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        target.copy_(source)


class _Staging:
    """Copies to a GPU through pinned memory: each thread fills one of its two buffers while the other travels, on a
    stream of its own. From pageable memory the driver would do the same with one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()
        self._streams: list[torch.cuda.Stream] = []
        self._built = torch.cuda.Event()  # the targets' memory is theirs from here on
        self._built.record(torch.cuda.current_stream(device))

    def copy(self, target: Tensor, source: Tensor) -> None:
        own = self._own
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(self._device)
            own.stream.wait_event(self._built)
            own.buffers = [(torch.empty(PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in "ab"]
            self._streams.append(own.stream)
        own.buffers.reverse()
        buffer, travelled = own.buffers[0]
        travelled.synchronize()
        arrived = buffer[: source.nbytes].view(source.dtype)
        _copy(arrived, source)
        with torch.cuda.stream(own.stream):
            if source.dtype != target.dtype:
                arrived = arrived.to(self._device, non_blocking=True)
            target.copy_(arrived, non_blocking=True)
            travelled.record(own.stream)

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()
