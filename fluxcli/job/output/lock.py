"""Who owns a job's directory: one process at a time, named to whoever is refused."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError
from fluxcli.core.files import TEMPORARY, json_line

_HEARTBEAT = 15.0  # seconds
_DEAD_AFTER = 90.0


class Lock:
    """DIR/.lock: held through flock, which dies with its process; its text names the owner to whoever is refused.

    `crashed` is what a dead owner left in it, or None.

    Raises:
        JobError: a living owner, by pid and host.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".lock"
        while True:
            self._file = open(self._path, "a+b")  # noqa: SIM115 - held until release()
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = self._owner()
                self._file.close()
                who = (
                    f"pid {owner['pid']} on {owner['host']}, since {owner['started_at']}"
                    if owner
                    else "another process"
                )
                raise JobError(f"{directory}: in use by {who}; one job may run in a directory at a time") from error
            # A releasing owner removes the file: make sure that the lock is on the one others will find.
            if self._path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                break
            self._file.close()
        owner = self.crashed = self._owner()
        if owner and owner["host"] != socket.gethostname():
            # On shared storage flock need not reach other hosts: there the heartbeat tells the living from the dead.
            silence = self._seconds_since_heartbeat()
            if silence < _DEAD_AFTER:
                self._file.close()
                raise JobError(
                    f"{directory}: in use by pid {owner['pid']} on {owner['host']}, alive {max(0, silence):.0f} s ago; "
                    f"if that machine is gone, run again in {_DEAD_AFTER:.0f} s"
                )
        self._released = threading.Event()
        self.claim(None)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def claim(self, run: int | None) -> None:
        """Writes the owner down, with the number of its run once that is known."""
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started_at": utc_now(), "run": run}
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json_line(owner))
        self._file.flush()

    def check(self) -> None:
        """Raises FileNotFoundError where the directory is no longer the one locked: moved, or its mount gone."""
        if not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
            raise FileNotFoundError(errno.ENOENT, "the job's directory was replaced by another", str(self._path.parent))

    def release(self) -> None:
        self._released.set()
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self.check()
                self._path.unlink()
            self._file.close()

    def _beat(self) -> None:
        while not self._released.wait(_HEARTBEAT):
            with contextlib.suppress(OSError, ValueError):  # the disk is the commit's to complain about
                os.utime(self._file.fileno())

    def _seconds_since_heartbeat(self) -> float:
        """By the file server's clock, which need not be ours."""
        probe = self._path.with_name(f".lock-{os.getpid()}{TEMPORARY}")
        probe.touch()
        try:
            return probe.stat().st_mtime - os.fstat(self._file.fileno()).st_mtime
        finally:
            probe.unlink()

    def _owner(self) -> dict[str, Any] | None:
        self._file.seek(0)
        try:
            owner: dict[str, Any] = json.loads(self._file.read())
            return owner if owner.keys() >= {"pid", "host", "started_at", "run"} else None
        except (ValueError, AttributeError):
            return None


def utc_now() -> str:
    """The time as every file of a job writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
