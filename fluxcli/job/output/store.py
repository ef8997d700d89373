"""A job's directory and its commit protocol: compute at least once, show each image exactly once.

An image is written to a temporary file beside its place and fsynced, renamed into place, its directory fsynced; then
the batch's rows are appended to manifest.jsonl and fsynced. So a row in the manifest means a whole image on disk,
whatever dies when. What a crash can leave behind - a temporary, an image without a row, half a line - `JobStore` clears
or redoes at the next start, after making what is there last. The first write that fails ends all commits: what the disk
holds then, nobody knows.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError
from fluxcli.core.files import TEMPORARY, fsync_directory, make_directories
from fluxcli.core.records import Failure, PromptRecord
from fluxcli.job.output.committed import committed_status, content, find
from fluxcli.job.output.failed import Failed
from fluxcli.job.output.identity import Given, check_identity, read_identity, write_given, write_identity
from fluxcli.job.output.lock import Lock, Owner
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import FailureRow, ManifestRow, R, RunRow
from fluxcli.job.output.sink import FileSink, Written

_FAILURES_AT_ONCE = 64  # in memory, each up to 16 MiB

_TEMPORARY = re.compile(
    rf"\.(job\.json|(manifest|failures|runs)\.jsonl|lock)([.-][0-9a-f]+)?{re.escape(TEMPORARY)}"
).fullmatch


class JobStore:
    """Opens a job's directory for writing, as its only owner until `close`.

    Args:
        identity: what fixes the pixels of the whole job; compared with job.json, or written there.
        input: its path, for it may lie in a directory that is no job yet.
        say: tells the user what was found and mended.

    Raises:
        JobError: another process owns the directory, it holds another job, or it cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        identity: dict[str, Any],
        suffix: str,
        say: Callable[[str], None] = lambda text: None,
        input: str | None = None,
    ) -> None:
        self.directory = directory
        self._say = say
        self._manifest = RowLog(directory / "manifest.jsonl", ManifestRow)
        self._failures = RowLog(directory / "failures.jsonl", FailureRow)
        self._runs = RowLog(directory / "runs.jsonl", RunRow)
        self.sink = FileSink(directory, suffix)
        self._barred: JobError | None = None
        with self._writing():
            make_directories(directory)
            self._lock = Lock(directory)
            try:
                check_identity(directory, identity, input)
                self._recover(identity)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        self.sink.close()
        self._lock.release()

    @cached_property
    def status(self) -> Callable[[PromptRecord], str | None]:
        """Asked of a record: "done" where its image is committed, else None.

        Raises:
            RowError: an image is committed under this id from another prompt or other settings.
        """
        return committed_status(self._found.images)

    def failed_before(self, id: str | None, line: int) -> bool:
        """Whether the row with this id, on this line where it has no id of its own, stands in failures.jsonl."""
        return (id, line) in self._failed

    @property
    def images(self) -> int:
        return len(self._found.images)

    def place(self, id: str, number: int) -> str:
        """The file name of the `number`-th image of this run."""
        return self.sink.place(id, self._rows_at_start + number)

    def write(self, file_name: str, data: bytes) -> Written:
        """Puts an image into its temporary file, on disk for sure. Safe to call from several threads."""
        if self._barred is not None:
            raise self._barred
        with self._writing():
            self._lock.check(lately=True)
            return self.sink.put(file_name, data)

    def commit(self, written: Sequence[Written], rows: Sequence[ManifestRow]) -> None:
        """Makes a batch's images and rows part of the job: all of an image's bytes first, its row last.

        Raises:
            JobError: the disk failed, now or before; an id is committed already; another process owns the job.
        """
        if self._barred is not None:
            raise self._barred
        images = self._found.images
        ids = [row.id for row in rows]
        taken = next((id for n, id in enumerate(ids) if id in images or id in ids[:n]), None)
        if taken is not None:
            raise JobError(
                f"{self.directory}: id {taken} is committed already; nothing is overwritten. Run again to go on"
            )
        with self._writing():
            self._lock.check()
            self.sink.publish(written)
            self._lock.check()
            self._manifest.append(rows)
            for each in written:
                for stray in self._found.strays.pop(each.file_name.rpartition("/")[2], ()):
                    if stray != each.file_name:
                        self.sink.discard(stray)
        for row in rows:
            images[row.id] = content(row)

    def fail(
        self,
        failures: Sequence[Failure],
        *,
        attempted: bool = True,
        whole: Callable[[Failure], Failure] = lambda failure: failure,
    ) -> None:
        """Appends to failures.jsonl, numbering each row's attempts. Of rows that were not `attempted`, being bad in the
        input, only what does not stand there yet.

        Args:
            whole: the failure with its row: a few at a time, for rows may be long and many.
        """
        for start in range(0, len(failures), _FAILURES_AT_ONCE):
            rows = [
                self._failed.add(whole(failure), self.run)
                for failure in failures[start : start + _FAILURES_AT_ONCE]
                if attempted or not self._failed.says_already(failure)
            ]
            with self._writing():
                self._lock.check()
                self._failures.append(rows)

    @property
    def failed(self) -> Failed:
        return self._failed

    def take_in(self, given: Given) -> None:
        """Writes down the input that this run goes by, and what is to be made of it."""
        with self._writing():
            self._lock.check()
            write_given(self.directory, given)

    def record_run(self, row: Mapping[str, Any]) -> None:
        """Appends this start's row to runs.jsonl."""
        with self._writing():
            self._lock.check()
            self._runs.append([RunRow.of({"run": self.run, **row})])

    def _recover(self, identity: dict[str, Any]) -> None:
        if read_identity(self.directory) is None:
            write_identity(self.directory, identity)
        for path in leftovers(self.directory):
            path.unlink()
        # Here alone, so that a mount that vanishes is an error and not an empty directory to start afresh in.
        self.sink.ready()
        logs: tuple[RowLog[Any], ...] = (self._manifest, self._failures, self._runs)
        for log in logs:
            if cut := log.settle():
                self._say(f"{log.path}: cut off {cut} bytes of a line that a crash left unfinished")
        fsync_directory(self.directory)
        self._failed = Failed()
        runs: set[int] = set()
        last_run = max(
            self._take(self._runs, lambda row: runs.add(row.run)), self._take(self._failures, self._failed.take)
        )
        self._found = find(self._manifest, self.sink)
        self._drop(self._manifest, self._found.dropped, self._found.told())
        self._rows_at_start = self._found.rows
        self.run = max(last_run, self._found.last_run) + 1
        crashed = self._lock.crashed
        if crashed and crashed.run is not None:
            self._note_crash(crashed, crashed.run, known=crashed.run in runs)
        self._lock.claim(self.run)

    def _take(self, log: RowLog[R], take: Callable[[R], None]) -> int:
        """Reads a log's rows, and drops the lines that a crash left unreadable; the highest number of a run, or -1."""
        dropped, last_run = set(), -1
        for number, row in log.read():
            if row is None:
                dropped.add(number)
            else:
                take(row)
                last_run = max(last_run, row.append[0])
        self._drop(log, dropped, f"removed {len(dropped)} lines that a crash left unreadable")
        return last_run

    def _drop(self, log: RowLog[Any], lines: set[int], told: str) -> None:
        if lines:
            log.rewrite(lambda number, line: None if number in lines else line)
            self._say(f"{log.path}: {told}")

    def _note_crash(self, owner: Owner, run: int, known: bool) -> None:
        self._say(f"{self.directory}: run {run} ({owner}) died; going on from there")
        self.run = max(self.run, run + 1)
        if not known:
            self._runs.append([RunRow(run=run, host=owner.host, started_at=owner.started_at)])

    def bar(self, error: OSError) -> JobError:
        """Ends all commits for a failing disk: a message with where, why, and how much room is left."""
        place = error.filename or self.directory
        try:
            room = f"; {shutil.disk_usage(self.directory).free / 2**20:.0f} MiB free there"
        except OSError:
            room = ""
        told = JobError(
            f"{place}: cannot be written: {error.strerror}{room}. Nothing committed is lost; run again to go on"
        )
        self._barred = self._barred or told
        return told

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Bars the store where the disk fails. After that, and after any other reason not to write, nothing is
        committed."""
        try:
            yield
        except JobError as error:
            self._barred = self._barred or error
            raise
        except OSError as error:
            raise self.bar(error) from error


def leftovers(directory: Path) -> list[Path]:
    """What killed processes left in DIR: files that were to become one of the job's."""
    with os.scandir(directory) as entries:
        return [
            directory / entry.name
            for entry in entries
            if _TEMPORARY(entry.name) and not entry.is_dir(follow_symlinks=False)
        ]
