"""The command's standard streams, which may be full, closed, or without a reader: messages that nobody can hear are
nothing, results that cannot be written are an error."""

import errno
import io
import os
import sys
from typing import Any

from fluxcli.core.errors import FluxcliError, UsageError


class Unwritable(FluxcliError):
    """A result could not be told. Quiet where its reader left, as in `fluxcli … | head`."""

    def __init__(self, error: OSError) -> None:
        reason = "it is closed" if error.errno == errno.EBADF else error.strerror
        super().__init__(f"standard output: cannot be written: {reason}")
        self.quiet = isinstance(error, BrokenPipeError)


class _Voice:
    quiet = False  # -q: errors alone are told


def be_quiet(quiet: bool = True) -> None:
    """From here on only errors are told, by libraries too."""
    _Voice.quiet = quiet
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def is_quiet() -> bool:
    return _Voice.quiet


def protect() -> None:
    """Replaces this process's standard streams by ones that know what they are for."""
    for descriptor in (1, 2):
        _occupy(descriptor)
    sys.stdout = _text(_Results(1, "w", closefd=False), sys.stdout, "surrogateescape")
    sys.stderr = _text(_Messages(2, "w", closefd=False), sys.stderr, "backslashreplace")
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_Closed()))


class _Results(io.FileIO):
    _failed = False

    def write(self, data: Any) -> int:
        if self._failed:  # told already; Python tries again at its end
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self._failed = True
            raise Unwritable(error) from error


class _Messages(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


class _Closed(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise UsageError("standard input is closed; there is nothing to read from it")


def _occupy(descriptor: int) -> None:
    """Sees to it that no file of the job is opened under the number of a closed standard stream, for libraries write
    there. What is written fails still, as it should."""
    try:
        os.fstat(descriptor)
    except OSError:
        nothing = os.open(os.devnull, os.O_RDONLY)
        if nothing != descriptor:
            os.dup2(nothing, descriptor)
            os.close(nothing)


def _text(file: io.FileIO, before: Any, errors: str) -> io.TextIOWrapper:
    """`before` is None where Python found the descriptor closed."""
    encoding = before.encoding if before else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, errors, line_buffering=True)
