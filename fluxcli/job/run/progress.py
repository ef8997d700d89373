"""How a running job shows itself on stderr: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fluxcli.core.terminal import printable

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts images done and failed out of `total`, from `start` on: getting the model ready is no part of the rate."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._done = self._failed = self._failed_before = 0
        self._started = self._last_line = clock()
        self._bar: tqdm[Any] | None = None

    def start(self) -> None:
        self._started = self._last_line = self._clock()
        self._failed_before = self._failed  # rows that could not be read, which are none of the total
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, unit="img", file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, done: int, failed: int = 0) -> None:
        self._done += done
        self._failed += failed
        if self._bar is not None:
            self._bar.set_postfix(failed=self._failed, refresh=False)
            self._bar.update(done)
        elif self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            self.say(self._line())

    def say(self, text: str) -> None:
        """A line of text beside the bar."""
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> str:
        rate = self._done / max(self._clock() - self._started, 1e-9)
        left = (self._total - self._done - self._failed + self._failed_before) / rate if rate else 0.0
        minutes, seconds = divmod(round(left), 60)
        return (
            f"{self._done}/{self._total} images, {rate:.2f} images/s, "
            f"{minutes // 60:d}:{minutes % 60:02d}:{seconds:02d} left, {self._failed} failed"
        )
