"""A batch that was submitted, and the clock of its stages."""

import time
from typing import Any

import torch
from torch import Tensor

from fluxcli.core.records import Batch, Images, Timing
from fluxcli.engine.runtime.faults import device_faults


class InFlight:
    """A submitted batch; `result()` waits for it."""

    def __init__(
        self, batch: Batch, pixels: Tensor, finite: Tensor, arrived: "torch.cuda.Event | None", clock: "Clock"
    ) -> None:
        self._batch, self._pixels, self._finite = batch, pixels, finite
        self._arrived, self._clock = arrived, clock

    def ready(self) -> bool:
        """Whether `result()` would return at once."""
        return self._arrived is None or self._arrived.query()

    def result(self) -> Images:
        images = len(self._batch.records)
        with device_faults(self._batch.key):
            if self._arrived is not None:
                self._arrived.synchronize()
            share = [seconds / images for seconds in self._clock.seconds()]
        return Images(self._pixels[:images].numpy(), self._finite[:images].tolist(), Timing(*share))


class Clock:
    """Seconds between marks: on the device's own clock where it has one."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._cuda:
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]
