"""Who owns a job's directory: one process at a time, named to whoever is refused."""

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError
from fluxcli.core.files import TEMPORARY, json_line, kind_of, open_regular
from fluxcli.job.output.rows import BadRow, read_object, shown
from fluxcli.job.output.sink import utc_now

_HEARTBEAT = 15.0  # seconds
_DEAD_AFTER = 90.0
_LARGEST = 2**16  # bytes
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def machine() -> str:
    """What flock surely reaches: this machine, since it was started. Host names are not told apart so surely."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that owns or owned a directory, as .lock names it. `run` is None before that is known; `machine` and
    `token` are None where an earlier fluxcli wrote it."""

    pid: int
    host: str
    started_at: str
    run: int | None
    machine: str | None = None
    token: str | None = None

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"

    @property
    def here(self) -> bool:
        """Whether it ran on this machine, so that flock has the last word on whether it lives."""
        return self.host == socket.gethostname() if self.machine is None else self.machine == machine()

    @classmethod
    def read(cls, data: bytes) -> "Owner":
        """Raises BadRow: what is wrong with it."""
        values = read_object(data)
        for name, kinds in _OWNER.items():
            value = values.get(name)
            if not isinstance(value, kinds) or isinstance(value, bool) or (kinds is int and not 0 <= value < 2**63):
                raise BadRow(f"{name} must not be {shown(value)}")
            if isinstance(value, str) and not (value.isprintable() and len(value) <= 256):
                raise BadRow(f"{name} must not be {shown(value)}")
            if name == "run" and value is not None and not 0 <= value < 2**62:
                raise BadRow(f"run must not be {shown(value)}")
        known: dict[str, Any] = {name: values.get(name) for name in _OWNER}
        return cls(**known)


_OWNER: dict[str, Any] = {
    "pid": int,
    "host": str,
    "started_at": str,
    "run": (int, type(None)),
    "machine": (str, type(None)),
    "token": (str, type(None)),
}


class Lock:
    """DIR/.lock: held through flock, which dies with its process; its text names the owner to whoever is refused.

    flock does not reach other machines on every shared disk. There a heartbeat tells the living from the dead, and a
    random token in the text tells an owner that was taken for dead that it is one no more.

    `crashed` is the dead owner who left it, or None.

    Raises:
        JobError: a living owner, by pid and host; or this disk cannot lock.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._path = directory, directory / ".lock"
        self._mine = Owner(os.getpid(), socket.gethostname(), utc_now(), None, machine(), secrets.token_hex(8))
        self._using = threading.RLock()  # held while the file is written, and while its descriptor may be closed
        self._checked = 0.0
        self._released = threading.Event()
        self._file = self._take()
        try:
            self.crashed = _owner(os.pread(self._file, _LARGEST, 0))
            if self.crashed and not self.crashed.here:
                self._believe(self.crashed)
            self.claim(None)
        except BaseException:
            os.close(self._file)
            raise
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def claim(self, run: int | None) -> None:
        """Writes the owner down, with the number of its run once that is known."""
        self._mine = Owner(**{**asdict(self._mine), "run": run})
        with self._using:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json_line(asdict(self._mine)), 0)

    def check(self, *, lately: bool = False) -> None:
        """Makes sure that the directory is still this process's. `lately` is content with a look a heartbeat ago.

        Raises:
            FileNotFoundError: the directory is no longer the one locked: moved, or its mount gone.
            JobError: another process owns it by now.
        """
        try:
            there = self._path.lstat()
        except FileNotFoundError:
            if not self._directory.is_dir():
                raise
            raise JobError(
                f"{self._directory}: its .lock is gone: another process took this job over and has ended since; this "
                "one stops. Nothing committed is lost; run again to go on"
            ) from None
        if not os.path.samestat(os.fstat(self._file), there):
            raise FileNotFoundError(errno.ENOENT, "the job's directory was replaced by another", str(self._directory))
        now = time.monotonic()
        if lately and now - self._checked < _HEARTBEAT:
            return
        with self._using:
            owner = _read(self._path)
        if owner is None or owner.token != self._mine.token:
            raise JobError(
                f"{self._directory}: {owner or 'another process'} has taken this job over, having heard nothing of "
                "this process for too long; this one stops. Nothing committed is lost"
            )
        self._checked = now

    def release(self) -> None:
        self._released.set()
        with self._using:
            if self._file >= 0:
                with contextlib.suppress(OSError, JobError):
                    self.check()
                    self._path.unlink()
                os.close(self._file)
                self._file = -1

    def _take(self) -> int:
        """A descriptor of .lock that has the lock."""
        while True:
            descriptor = open_regular(self._path, os.O_RDWR | os.O_CREAT)
            try:
                self._flock(descriptor)
                found = os.fstat(descriptor)
                if found.st_nlink > 1:
                    raise JobError(f"{self._path}: is another file too, by another name; remove this name of it")
                # A releasing owner removes the file: make sure that the lock is on the one others will find.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(found, self._path.lstat()):
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _flock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read(self._path)
            who = f"{owner}, since {owner.started_at}" if owner else "another process"
            raise JobError(f"{self._directory}: in use by {who}; one job may run in a directory at a time") from error
        except OSError as error:
            raise JobError(
                f"{self._path}: cannot be locked ({error.strerror}), so nothing tells whether another job runs here. "
                "Mount this disk with locks, or choose -o on another"
            ) from error

    def _believe(self, owner: Owner) -> None:
        """Raises JobError where an owner on another machine may be alive."""
        silence = self._seconds_since_heartbeat()
        if silence < _DEAD_AFTER:
            raise JobError(
                f"{self._directory}: in use by {owner}, alive {max(0, silence):.0f} s ago; "
                f"if that machine is gone, run again in {_DEAD_AFTER:.0f} s"
            )

    def _beat(self) -> None:
        while not self._released.wait(_HEARTBEAT):
            with self._using:
                if self._released.is_set():
                    return
                try:
                    self.check()  # another's heart is not ours to beat
                    os.utime(self._file)
                except JobError:
                    return
                except OSError:  # the disk is the commit's to complain about
                    continue

    def _seconds_since_heartbeat(self) -> float:
        """By the file server's clock, which need not be ours."""
        probe = self._path.with_name(f".lock-{self._mine.token}{TEMPORARY}")
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            return os.fstat(descriptor).st_mtime - os.fstat(self._file).st_mtime
        finally:
            os.close(descriptor)
            probe.unlink()


def _read(path: Path) -> Owner | None:
    """The owner whom .lock names; None where it names none, not even when asked again: one is just written down."""
    for pause in (0.0, 0.05, 0.2):
        time.sleep(pause)
        try:
            with open(open_regular(path), "rb") as file:
                owner = _owner(file.read(_LARGEST))
        except FileNotFoundError:  # just released
            return None
        if owner is not None:
            break
    return owner


def _owner(data: bytes) -> Owner | None:
    try:
        return Owner.read(data)
    except BadRow:
        return None


def owner(directory: Path) -> Owner | None:
    """Whom a directory's .lock names: who is at work there, or died there."""
    with contextlib.suppress(JobError, OSError):
        return _read(directory / ".lock")
    return None


def heard_lately(directory: Path) -> bool:
    """Whether the owner's heart beat within the time after which it is given up, by this machine's clock."""
    try:
        return time.time() - (directory / ".lock").lstat().st_mtime < _DEAD_AFTER
    except OSError:
        return False


def problem_with(directory: Path) -> str | None:
    """What is wrong with a directory's .lock, if it has one."""
    path = directory / ".lock"
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        return f"is {kind_of(mode)}"
    if _read(path) is not None or not path.exists():
        return None
    try:
        with open(open_regular(path), "rb") as file:
            data = file.read(_LARGEST)
        if data.strip(b"\0"):  # else a crash came before its text was on disk
            Owner.read(data)
    except BadRow as error:
        return str(error)
    return None
