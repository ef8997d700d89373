"""How a running job shows itself on stderr: a bar on a terminal, else a line now and then."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fluxcli.core.terminal import printable

_SECONDS_BETWEEN_LINES = 30.0
_PATIENCE = 2.0  # seconds in which nothing need be said


class Progress:
    """Counts images done and failed out of `total`, from `start` on: getting the model ready is no part of the rate."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._done = self._failed = self._failed_before = 0
        self._started = self._last_line = clock()
        self._bar: tqdm[Any] | None = None
        self.pulse: Callable[[], str] | None = None  # how worker processes are, in a few words

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
            self._bar.set_postfix_str(f"failed={self._failed}{self._workers()}", refresh=False)
            self._bar.update(done)
        elif self._clock() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            self.say(self._line())

    def end(self) -> None:
        """A last word about workers, if there were any."""
        if self.pulse:
            self.say(self.pulse())

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
            f"{minutes // 60:d}:{minutes % 60:02d}:{seconds:02d} left, {self._failed} failed{self._workers()}"
        )

    def _workers(self) -> str:
        return f", {self.pulse()}" if self.pulse else ""


class Reading:
    """Called for each row of the input, and says how many there were where that takes long."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._rows = 0
        self._next_line = clock() + _PATIENCE

    def __call__(self) -> None:
        self._rows += 1
        if self._clock() >= self._next_line:
            self._next_line = self._clock() + _SECONDS_BETWEEN_LINES
            self._say(f"reading rows: {self._rows} so far")


@contextlib.contextmanager
def told_if_slow(say: Callable[[str], None], text: str) -> Iterator[None]:
    """Says what is going on where it goes on for long."""
    timer = threading.Timer(_PATIENCE, say, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
