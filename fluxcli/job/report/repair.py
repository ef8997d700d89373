"""`fluxcli verify --repair`: puts right what can be, and clears what the next run then makes again."""

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError
from fluxcli.core.files import open_regular, write_all
from fluxcli.job.output import rows
from fluxcli.job.output.lock import Lock
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.output.sink import ROOT, FileSink, may_remove
from fluxcli.job.report import mend
from fluxcli.job.report.verify import Verdict, logs, require_job

_MOVED = ".removed"  # ends the name of the file that takes the lines which are no rows


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keeps jobs out of the directory while the block runs: what `repair` removes must not change after the look.

    Raises:
        JobError: the directory holds no job, or one is running in it.
    """
    require_job(directory)
    try:
        _clear(directory / ".lock")
        lock = Lock(directory)
    except OSError as error:
        raise JobError(f"{directory}: cannot be repaired: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def repair(verdict: Verdict) -> list[str]:
    """Writes rows as they should be, and removes what the next run will redo: rows without a good image, images without
    a good row, broken lines, which go into a file beside theirs. To be called `alone`, as the `verify` before it.

    Returns what it had to leave, and why.
    """
    try:
        for log in logs(verdict.directory):
            _clear(log.path)
            with contextlib.suppress(JobError):  # told below
                _rewrite(log, verdict)
        return _remove(verdict)
    except OSError as error:
        raise JobError(f"{error.filename or verdict.directory}: cannot be repaired: {error.strerror}") from error


def _rewrite(log: RowLog[Any], verdict: Verdict) -> None:
    name = log.path.name
    dropped, moved, mended = verdict.dropped.get(name, ()), verdict.moved.get(name), verdict.mended.get(name, {})
    log.settle()
    if not dropped and not moved and not mended:
        return
    if moved:
        _keep_aside(log, moved)

    def change(number: int, line: bytes) -> bytes | None:
        if number in dropped or (moved and number in moved):
            return None
        if number in mended:
            row, sha256 = mend.row_of(log.kind, line), mended[number]
            assert row is not None
            return rows.write(replace(row, sha256=sha256) if sha256 else row).rstrip(b"\n")
        return line

    log.rewrite(change)


def _keep_aside(log: RowLog[Any], moved: set[int]) -> None:
    path = log.path.with_name(log.path.name + _MOVED)
    descriptor = open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        for number, line in log.lines():
            if number in moved:
                write_all(descriptor, line + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(verdict: Verdict) -> list[str]:
    """Removes the files of the problems that no row left speaks of, and none but fluxcli's own."""
    directory, left = verdict.directory, []
    found = {problem.file_name: problem for problem in verdict.problems if problem.file_name.startswith(ROOT)}
    manifest: RowLog[ManifestRow] = logs(directory)[0]
    for number, line in manifest.lines() if found else ():
        found.pop(manifest.parse(number, line).file_name, None)
    with closing(FileSink(directory, "")) as sink:
        for name, problem in found.items():
            if problem.kind == "orphan" and not may_remove(name.rpartition("/")[2]):
                left.append(f"{name}: {problem.detail}")
                continue
            try:
                sink.discard(name)
            except OSError as error:
                left.append(f"{name}: cannot be removed: {error.strerror}")
    for problem in verdict.problems:
        if problem.kind == "temporary" and "/" not in problem.file_name:
            (directory / problem.file_name).unlink(missing_ok=True)
        elif problem.kind == "bad_job" or (
            problem.kind == "not_a_file" and os.path.lexists(directory / problem.file_name)
        ):
            left.append(f"{problem.file_name}: {problem.detail}")
    return left


def _clear(path: Path) -> None:
    """Removes what is no file where one should be, if nothing is lost with it: a dangling link, a pipe, a socket, an
    empty directory; of .lock, any link."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        with contextlib.suppress(OSError):
            path.rmdir()
    elif not stat.S_ISREG(mode) and not (stat.S_ISLNK(mode) and path.exists() and path.name != ".lock"):
        path.unlink()
