"""Files that survive a crash and harm nobody: replaced whole or not at all, on disk for sure before anyone is told,
opened without following a link or waiting for a pipe."""

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fluxcli.core.errors import JobError
from fluxcli.core.terminal import printable

TEMPORARY = ".tmp"  # ends the name of every file that is not finished
_LONGEST_STEM = 200  # bytes of the final name that its temporary's carries: names end at 255
# What `open_regular` adds: a link is refused, a pipe does not block.
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def temporary_name(name: str) -> str:
    """A name of its own for what will become `name`: two processes never write the same one."""
    stem = os.fsdecode(os.fsencode(name)[:_LONGEST_STEM])
    return f".{stem}.{secrets.token_hex(4)}{TEMPORARY}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to fill: it stands in `path`'s place, whole and on disk for sure, once the block ends; where the block
    fails, `path` is as it was."""
    temporary = path.with_name(temporary_name(path.name))
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY, 0o666)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a plain file: no link is followed, no pipe waited for.

    Raises:
        JobError: something else lies there.
        OSError: as `os.open`.
    """
    try:
        descriptor = os.open(path, flags | _SAFELY, 0o666)
    except OSError:
        refuse_irregular(path)
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise JobError(f"{path}: is {kind_of(mode)} where fluxcli keeps a file; move it away")
    return descriptor


def refuse_irregular(path: Path) -> None:
    """Raises JobError where something lies at `path` that is no plain file."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise JobError(f"{path}: is {kind_of(mode)} where fluxcli keeps a file; move it away")


def kind_of(mode: int) -> str:
    """A file's kind in words, of its st_mode."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")


def write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_directories(directory: Path) -> None:
    """Makes a directory and what is missing above it, and makes every name on the way to it last: a killed process may
    have made them and told nobody."""
    directory.mkdir(parents=True, exist_ok=True)
    below = directory.resolve()
    device = below.stat().st_dev
    for parent in below.parents:
        try:
            if parent.stat().st_dev != device:
                break
            fsync_directory(parent)
        except OSError:  # a parent that may not be read: its owner made the name long ago
            break


def fsync_directory(directory: Path) -> None:
    """Makes renames and new names in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folds_case(directory: Path) -> bool:
    """Whether names below a directory, which need not exist yet, are one file where they differ by case alone. Tells by
    a name that is there already, and writes nothing."""
    path = directory.absolute()
    for place in (path / "images", path, *path.parents):
        other = place.with_name(place.name.swapcase())
        if other.name != place.name and place.exists():
            return other.exists() and other.samefile(place)
    return False


def json_text(row: dict[str, Any]) -> str:
    """A row as JSON; what a terminal would obey stands in it as an escape, so that a file can be looked at."""
    return printable(json.dumps(row, ensure_ascii=False, allow_nan=False))


def json_line(row: dict[str, Any]) -> bytes:
    return f"{json_text(row)}\n".encode()
