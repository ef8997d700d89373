"""How a running job shows itself on stderr: a bar on a terminal, else a line now and then."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from tqdm import tqdm

from fluxcli.core.terminal import printable

_SECONDS_BETWEEN_LINES = 30.0
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"
_PATIENCE = 2.0  # seconds in which nothing need be said


class Progress:
    """Counts images done and failed out of `total`, from `start` on: getting the model ready is no part of the rate.

    Args:
        work: what all of them cost, in any unit; without it they are taken to cost the same.
        quiet: show and say nothing.
    """

    def __init__(
        self,
        total: int,
        work: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ) -> None:
        self._total, self._clock, self._quiet = total, clock, quiet
        self._work = self._left = float(total) if work is None else work
        self._done = self._failed = 0
        self._started = self._last_line = clock()
        self._bar: _Bar | None = None
        self.pulse: Callable[[], str] | None = None  # how worker processes are, in a few words

    def start(self) -> None:
        self._started = self._last_line = self._clock()
        self._left = self._work  # rows that could not be read are none of it
        if sys.stderr.isatty() and not self._quiet:
            self._bar = _Bar(total=self._total, unit="img", file=sys.stderr, bar_format=_FORMAT, **_size())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, done: int, failed: int = 0, work: float | None = None) -> None:
        """`work` is what these cost; without it they cost as much as all do on average."""
        self._done += done
        self._failed += failed
        self._left -= (done + failed) * self._work / max(self._total, 1) if work is None else work
        if self._bar is not None:
            self._bar.left = self._time_left()
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
        if self._quiet:
            return
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def stopping(self, batches: int, work: float, seconds: float) -> str:
        """What a stop is told while so many batches are in flight, which cost `work` and began `seconds` ago."""
        if not batches:
            return "stopping when the last files are saved; again quits now"
        done, left = self._work - self._left, ""
        if done > 0:
            left = f" (about {max(1, round((self._clock() - self._started) * work / done - seconds))} s)"
        what = "batch" if batches == 1 else f"{batches} batches"
        return f"stopping after the {what} in flight{left}; again quits now"

    def _line(self) -> str:
        rate = self._done / max(self._clock() - self._started, 1e-9)
        images = f"{self._done}/{self._total} images, {rate:.2f} images/s"
        return f"{images}, {self._time_left()} left, {self._failed} failed{self._workers()}"

    def _time_left(self) -> str:
        """By the work that is left, not by images: large ones and those of many steps are made first."""
        done = self._work - self._left
        seconds = round((self._clock() - self._started) * max(self._left, 0.0) / done) if done > 0 else 0
        return f"{seconds // 3600:d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def _workers(self) -> str:
        return f", {self.pulse()}" if self.pulse else ""


class _Bar(tqdm):  # type: ignore[misc]
    """tqdm's, with our own time left."""

    left = "?"

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "left": self.left}


def _size() -> dict[str, Any]:
    """As wide as the terminal; where that says it has no columns, as new ones do, as most are."""
    try:
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 79, "nrows": 24}


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
