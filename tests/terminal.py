"""Commands run in a pseudo-terminal, as a person runs them."""

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shown:
    """What a command left on its terminal, as bytes came, and how it ended."""

    text: str
    returncode: int


def run(
    words: Sequence[str],
    columns: int,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    typed: Callable[[str], bytes] = lambda text: b"",
    timeout: float = 300,
) -> Shown:
    """Runs a command in a terminal of 24 lines and so many columns; 0 is one that does not know its size.

    Args:
        typed: given all that is shown so far whenever more is, says what to type.
    """
    size = struct.pack("HHHH", 24 if columns else 0, columns, 0, 0)
    pid, terminal = pty.fork()
    if not pid:
        fcntl.ioctl(0, termios.TIOCSWINSZ, size)
        os.chdir(cwd or ".")
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execvpe(words[0], [*words], {**environment, "TERM": "xterm", **(env or {})})
    data, end = b"", time.monotonic() + timeout
    try:
        while True:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            if not select.select([terminal], [], [], 1.0)[0]:
                continue
            try:
                part = os.read(terminal, 2**16)
            except OSError:  # Linux says so where nobody has the other end open
                break
            if not part:
                break
            data += part
            if keys := typed(data.decode(errors="replace")):
                os.write(terminal, keys)
    finally:
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return Shown(data.decode(errors="replace"), os.waitstatus_to_exitcode(status))
