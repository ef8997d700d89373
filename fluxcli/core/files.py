"""JSON lines and files that survive a crash: appended or replaced whole, on disk for sure before anyone is told."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError
from fluxcli.core.terminal import printable

TEMPORARY = ".tmp"  # ends the name of every file that is not finished


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows in one write, on disk for sure."""
    data = b"".join(map(json_line, rows))
    if not data:
        return
    new = not path.exists()
    with path.open("ab", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    if new:
        fsync_directory(path.parent)


def read_rows(path: Path, *keys: str, torn_ok: bool = False) -> Iterator[dict[str, Any]]:
    """Every row of a file that may not exist yet. `torn_ok` passes over a last line without its end.

    Raises:
        JobError: naming the line that is no JSON object or lacks one of `keys`.
    """
    if not path.exists():
        return
    required = set(keys)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if torn_ok and not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line.decode())
                complete = required <= row.keys()
            except (ValueError, AttributeError) as error:
                raise JobError(f"{path}, line {number}: not a row of JSON; run fluxcli verify --repair") from error
            if not complete:
                missing = ", ".join(sorted(required - row.keys()))
                raise JobError(f"{path}, line {number}: has no {missing}; run fluxcli verify --repair")
            yield row


def cut_torn_line(path: Path) -> int:
    """Cuts off what follows the last line end of a file; returns the bytes removed."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 2**16)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
        return size - end


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Replaces a file whole, or not at all."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Makes renames and new names in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
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
