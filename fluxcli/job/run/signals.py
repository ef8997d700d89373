"""SIGINT and SIGTERM, from the command's first line to its last.

A handler that raises is lost wherever somebody catches everything: amid an import, in a destructor, in a callback from
C. So none here does. Work that must not be cut short is `held`: a signal is noted, and the work looks for it and ends
by itself. Anywhere else nothing is in flight, and the process ends on the spot after its last words. A second signal
always ends it at once, which everything that is written can bear.

Until this module is imported a signal finds Python's own handler: so it imports next to nothing.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """SIGINT or SIGTERM came, and what was in flight is finished."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def tell(line: str) -> None:
    """Writes to stderr past Python's streams, which may be what was interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


def _last_words(stop: Stopped) -> None:
    tell(f"{stop}; run the same command again")


class _State:
    def __init__(self) -> None:
        self.owner = 0  # the process: a fork of it has its parent's handlers and none of its work
        self.received: int | None = None
        self.installed = False
        self.held = 0
        self.last_words: Callable[[Stopped], None] = _last_words
        self.in_flight: Callable[[], str] | None = None


_state = _State()  # the process's: signals know no other scope


def install() -> None:
    """Ends this process with 130 or 143 at a signal from here on: for a command, which owns its process."""
    if not _state.installed:
        _state.owner, _state.installed = os.getpid(), True
        for number in _SIGNALS:
            signal.signal(number, _on_signal)


def noted() -> bool:
    """Whether a signal came."""
    return _state.received is not None


def check() -> None:
    """Raises Stopped if a signal came."""
    if _state.received is not None:
        raise Stopped(_state.received)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Notes signals and does not act on them: `noted` and `check` tell. In a process that never called `install`, for
    as long as this lasts."""
    with contextlib.ExitStack() as stack:
        if not _state.installed and not _state.held and threading.current_thread() is threading.main_thread():
            _state.owner, _state.received = os.getpid(), None
            for number in _SIGNALS:
                stack.callback(signal.signal, number, signal.signal(number, _on_signal))
        _state.held += 1
        try:
            yield
        finally:
            _state.held -= 1


@contextlib.contextmanager
def last_words(say: Callable[[Stopped], None]) -> Iterator[None]:
    """Has `say` called before a signal ends the process. It runs between any two instructions of the main thread, and
    so relies on nothing that the main thread may be amid."""
    before, _state.last_words = _state.last_words, say
    try:
        yield
    finally:
        _state.last_words = before


@contextlib.contextmanager
def in_flight(words: Callable[[], str]) -> Iterator[None]:
    """Has `words()` told when a signal is noted, since what is held may take a while; and that a second one does not
    wait for it. Called as `last_words` are."""
    before, _state.in_flight = _state.in_flight, words
    try:
        yield
    finally:
        _state.in_flight = before


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.owner:
        os._exit(128 + number)
    if _state.received is not None:
        if _state.in_flight:
            _tell_beside(number, "quitting now; what is committed stays. Run the same command again to go on.")
        os._exit(128 + number)
    _state.received = number
    if not _state.held:
        _leave(number)
    elif _state.in_flight:
        with contextlib.suppress(Exception):  # it is no more than a word
            _tell_beside(number, _state.in_flight())


def _tell_beside(number: int, line: str) -> None:
    """Tells it on a line of its own: a terminal has echoed ^C, beside a bar or not."""
    tell(f"\n{line}" if number == signal.SIGINT and os.isatty(2) else line)


def _leave(number: int) -> None:
    try:
        _end_children()
        if number == signal.SIGINT and os.isatty(2):
            os.write(2, b"\n")
        _state.last_words(Stopped(number))
    except BaseException as error:
        tell(f"Error: {error}")
    finally:
        os._exit(128 + number)


def _end_children() -> None:
    """They would wait for their parent for ever."""
    with contextlib.suppress(Exception):  # as where the library is just being imported
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
