"""A worker's process: how it is started, heard and ended; and which of them a job has."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fluxcli.core.terminal import printable_line
from fluxcli.job.fleet.deadlines import Patience
from fluxcli.job.fleet.wire import Wire

_TAIL = 2**12  # bytes of what it printed that are kept
_PART, _PARTS = 2**16, 16  # bytes at once, and how often before an end; a pipe holds one part
_LINE = 300  # characters
_LONGEST = 2**24  # bytes of a message from it


class Spawned(Protocol):
    """A worker's process, here or on another machine. `words` is a descriptor of what it prints, if it is here."""

    @property
    def wire(self) -> Wire: ...
    @property
    def words(self) -> int | None: ...
    def listen(self) -> bool: ...
    def end(self, patience: float = 0.0) -> int | None: ...
    def close(self) -> None: ...
    def last_words(self) -> str: ...


@dataclass(frozen=True)
class Workers:
    """What the processes of a job are.

    Args:
        settings: what they make an engine of; plain values.
        names: one each.
        spawn: starts the one of a number, given how often that was done before too.
        encoders: threads of each that encode images; None for its share of this machine.
        scattered: over several machines.
    """

    settings: Mapping[str, Any]
    names: Sequence[str]
    spawn: Callable[[int, int], Spawned]
    patience: Patience = field(default_factory=Patience)
    encoders: int | None = None
    scattered: bool = False

    def first(self, number: int) -> "Workers":
        """No more of them than there is work for."""
        return replace(self, names=self.names[:number])


class Process:
    """`python -m MODULE NUMBER DESCRIPTOR` in a session of its own: a terminal's Ctrl-C is for the job alone, and what
    it starts itself ends with it. What it prints is kept to be quoted.

    Args:
        environment: what differs there from this process's.
    """

    def __init__(self, module: str, number: int, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self.words, write = os.pipe()
        try:
            self._process = subprocess.Popen(
                # Its modules come from where this process's do, and none from the current directory (-P).
                [sys.executable, "-P", "-m", module, str(number), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **environment},
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(self.words)
            raise
        finally:
            theirs.close()
            os.close(write)
        ours.setblocking(False)
        os.set_blocking(self.words, False)
        self.wire = Wire(ours, _LONGEST)
        self._tail, self._ended = b"", False

    def listen(self) -> bool:
        """Takes in some of what it printed; False where it will print no more."""
        try:
            part = os.read(self.words, _PART)
        except BlockingIOError:
            return True
        self._tail = (self._tail + part)[-_TAIL:]
        return bool(part)

    def end(self, patience: float = 0.0) -> int | None:
        """Kills it where it has not ended in `patience` seconds. Its exit status; None where not even that ends it, as
        while it waits for a device or a disk that hangs."""
        if self._ended:  # its number may be another's by now
            return self._process.returncode
        self._ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        return self._process.returncode

    def close(self) -> None:
        self.wire.close()
        os.close(self.words)

    def last_words(self) -> str:
        """The last line it printed; "" where there is none."""
        for _ in range(_PARTS):
            if not self.listen():
                break
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        return printable_line(lines[-1][:_LINE]) if lines else ""


def local(module: str, environments: Sequence[Mapping[str, str]]) -> Callable[[int, int], Process]:
    """Starts processes of this machine, each in its environment; `module` calls `serve`."""
    return lambda number, before: Process(module, number, environments[number])


def how(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "does not end"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exited with {status}"
