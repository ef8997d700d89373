"""A job's directory and its commit protocol: compute at least once, show each image exactly once.

A picture is written to a temporary file beside its place and fsynced, renamed into place, its directory fsynced; then
the batch's rows are appended to manifest.jsonl and fsynced. So a row in the manifest means a whole picture on disk,
whatever dies when. What a crash can leave behind - a temporary, a picture without a row, half a line - `JobStore`
clears or redoes at the next start.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError, RowError
from fluxcli.core.files import (
    TEMPORARY,
    append_rows,
    cut_torn_line,
    fsync_directory,
    json_text,
    read_rows,
    write_atomically,
)
from fluxcli.core.records import Failure, PromptRecord
from fluxcli.job.output.lock import Lock, utc_now

FILES_PER_DIRECTORY = 10_000
# What a start relies on in the rows of each file.
FAILURE_KEYS = ("id", "line", "attempt", "run")
RUN_KEYS = ("run",)
_SETTINGS = ("prompt", "seed", "width", "height", "num_inference_steps", "guidance_scale")
_settings_of_row, _settings_of_record = itemgetter(*_SETTINGS), attrgetter(*_SETTINGS)
MANIFEST_KEYS = ("id", "file_name", "sha256", "run", "finished_at", *_SETTINGS)


@dataclass(frozen=True, slots=True)
class Written:
    """A picture in its temporary file, ready to be committed."""

    temporary: Path
    final: Path
    sha256: str
    finished_at: str


class JobStore:
    """Opens a job's directory for writing, as its only owner until `close`.

    Args:
        identity: what fixes the pixels of the whole job; compared with job.json, or written there.
        say: tells the user what was found and mended.

    Raises:
        JobError: another process owns the directory, it holds another job, or it cannot be written.
    """

    def __init__(
        self, directory: Path, identity: dict[str, Any], suffix: str, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.directory = directory
        self._suffix = suffix
        self._say = say
        self._manifest_path = directory / "manifest.jsonl"
        self._failures_path = directory / "failures.jsonl"
        self._runs_path = directory / "runs.jsonl"
        with self._writing():
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(directory)
            try:
                check_identity(directory, identity)
                self._recover(identity)
            except BaseException:
                self._lock.release()
                raise

    def close(self) -> None:
        self._lock.release()

    @cached_property
    def status(self) -> Callable[[PromptRecord], str | None]:
        """Asked of a record: "done" where its image is committed, else None.

        Raises:
            RowError: an image is committed under this id from another prompt or other settings.
        """
        return committed_status(self._committed)

    def failed_before(self, id: str | None, line: int) -> bool:
        """Whether the row with this id on this line stands in failures.jsonl."""
        return (id, line) in self._attempts

    @property
    def images(self) -> int:
        return len(self._committed)

    def place(self, id: str, number: int) -> Path:
        """Where the `number`-th image of this run goes: at most FILES_PER_DIRECTORY in one directory."""
        shard = (self._rows_at_start + number) // FILES_PER_DIRECTORY
        folder = self.directory / "images"
        return (folder / f"{shard:04d}" if shard else folder) / f"{id}{self._suffix}"

    def write(self, final: Path, data: bytes) -> Written:
        """Puts a picture into its temporary file, on disk for sure. Safe to call from several threads."""
        with self._writing():
            self._lock.check()
            final.parent.mkdir(exist_ok=True)
            temporary = final.with_name(f".{final.name}{TEMPORARY}")
            now = utc_now()
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                # The row's own time, to the nanosecond: at the next start this vouches that nobody wrote here since.
                os.utime(file.fileno(), ns=(_nanoseconds(now),) * 2)
                os.fsync(file.fileno())
            return Written(temporary, final, hashlib.sha256(data).hexdigest(), now)

    def commit(self, written: Sequence[Written], rows: Sequence[dict[str, Any]]) -> None:
        """Makes a batch's pictures and rows part of the job: all of a picture's bytes first, its row last."""
        with self._writing():
            self._lock.check()
            for each in written:
                os.replace(each.temporary, each.final)
            for folder in {each.final.parent for each in written}:
                fsync_directory(folder)
            append_rows(self._manifest_path, rows)
            for each in written:
                stray = self._orphans.pop(each.final.name, None)
                if stray is not None and stray != each.final:
                    stray.unlink(missing_ok=True)
        for row in rows:
            self._committed[row["id"]] = _content(_settings_of_row(row))

    def fail(self, failures: Iterable[Failure]) -> None:
        """Appends to failures.jsonl, numbering each row's attempts."""
        rows = []
        for failure in failures:
            key = failure.id, failure.line
            self._attempts[key] = attempt = self._attempts.get(key, 0) + 1
            rows.append({**failure.as_row(), "attempt": attempt, "run": self.run})
        with self._writing():
            self._lock.check()
            append_rows(self._failures_path, rows)

    def record_run(self, row: dict[str, Any]) -> None:
        """Appends this start's row to runs.jsonl."""
        with self._writing():
            self._lock.check()
            append_rows(self._runs_path, [{"run": self.run, **row}])

    def _recover(self, identity: dict[str, Any]) -> None:
        job = self.directory / "job.json"
        if not job.exists():
            for name in ("images", "manifest.jsonl"):
                if (self.directory / name).exists():
                    raise JobError(f"{self.directory}: has {name} but no job.json, so it is no job; choose another -o")
            write_atomically(job, [json.dumps(identity, indent=2, ensure_ascii=False), "\n"])
        # Here alone, so that a mount that vanishes is an error and not an empty directory to start afresh in.
        (self.directory / "images").mkdir(exist_ok=True)
        for path in (self._manifest_path, self._failures_path, self._runs_path):
            if cut := cut_torn_line(path):
                self._say(f"{path}: cut off {cut} bytes of a line that a crash left unfinished")
        self.run = max(self._read_runs(), self._read_failures(), self._read_manifest()) + 1
        crashed = self._lock.crashed
        if crashed and crashed["run"] is not None:
            self._note_crash(crashed)
        self._lock.claim(self.run)

    def _read_manifest(self) -> int:
        """Takes in each id's first row with a picture and drops all others: what then has none is redone."""
        pictures, last_run = self._pictures(), -1
        self._committed: dict[str, int] = {}
        lost: dict[str, str] = {}  # id -> what is wrong with its picture
        dropped: set[int] = set()
        for number, row in enumerate(read_rows(self._manifest_path, *MANIFEST_KEYS)):
            last_run = max(last_run, row["run"])
            if row["id"] in self._committed:
                dropped.add(number)
                continue
            modified = pictures.pop(row["file_name"], None)
            if modified is None:
                problem = "no picture"
            elif modified != _nanoseconds(row["finished_at"]) and not self._unchanged(row):
                problem = "picture altered"
            else:
                self._committed[row["id"]] = _content(_settings_of_row(row))
                lost.pop(row["id"], None)
                continue
            dropped.add(number)
            lost.setdefault(row["id"], problem)
        self._rows_at_start = len(self._committed) + len(lost)
        self._orphans = {Path(name).name: self.directory / name for name in pictures}
        if dropped:
            numbered = enumerate(read_rows(self._manifest_path))
            kept = (f"{json_text(row)}\n" for number, row in numbered if number not in dropped)
            write_atomically(self._manifest_path, kept)
            self._say(f"{self._manifest_path}: {self._mended(lost, len(dropped) - len(lost))}")
        return last_run

    def _mended(self, lost: dict[str, str], doubled: int) -> str:
        told = []
        if lost:
            shown = ", ".join(f"{id} ({problem})" for id, problem in list(lost.items())[:3])
            told.append(f"redoing {len(lost)} rows: {shown}" + (f" and {len(lost) - 3} more" if len(lost) > 3 else ""))
        if doubled:
            told.append(f"removed {doubled} rows of ids that have another")
        return "; ".join(told)

    def _pictures(self) -> dict[str, int]:
        """Every file under images/ by its name in the manifest, with its time of change in nanoseconds. Temporaries,
        which only a crash leaves behind, are removed."""
        found = {}
        folders = [self.directory / "images"]
        while folders:
            folder = folders.pop()
            if not folder.is_dir():
                continue
            prefix = folder.relative_to(self.directory).as_posix()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(Path(entry.path))
                    elif entry.name.startswith(".") and entry.name.endswith(TEMPORARY):
                        os.unlink(entry.path)
                    else:
                        found[f"{prefix}/{entry.name}"] = entry.stat().st_mtime_ns
        return found

    def _unchanged(self, row: dict[str, Any]) -> bool:
        path = self.directory / row["file_name"]
        with path.open("rb") as file:
            same: bool = hashlib.file_digest(file, "sha256").hexdigest() == row["sha256"]
        if same:  # copied or restored: vouch for it again
            os.utime(path, ns=(_nanoseconds(row["finished_at"]),) * 2)
        return same

    def _read_failures(self) -> int:
        self._attempts: dict[tuple[str | None, int], int] = {}
        last_run = -1
        for row in read_rows(self._failures_path, *FAILURE_KEYS):
            self._attempts[row["id"], row["line"]] = row["attempt"]
            last_run = max(last_run, row["run"])
        return last_run

    def _read_runs(self) -> int:
        return max((row["run"] for row in read_rows(self._runs_path, *RUN_KEYS)), default=-1)

    def _note_crash(self, owner: dict[str, Any]) -> None:
        self._say(
            f"{self.directory}: run {owner['run']} (pid {owner['pid']} on {owner['host']}) died; going on from there"
        )
        self.run = max(self.run, owner["run"] + 1)
        known = {row["run"] for row in read_rows(self._runs_path)}
        if owner["run"] not in known:
            row = {"run": owner["run"], "host": owner["host"], "started_at": owner["started_at"], "exit_status": None}
            append_rows(self._runs_path, [row])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a failing disk into a message with what the user needs: where, why, and how much room is left."""
        try:
            yield
        except OSError as error:
            place = error.filename or self.directory
            try:
                room = f"; {shutil.disk_usage(self.directory).free / 2**20:.0f} MiB free there"
            except OSError:
                room = ""
            raise JobError(
                f"{place}: cannot be written: {error.strerror}{room}. Nothing committed is lost; run again to go on"
            ) from error


def check_identity(directory: Path, identity: dict[str, Any]) -> None:
    """Refuses a directory that holds another job, with every difference spelled out.

    Raises:
        JobError: the differences by option name.
    """
    job = directory / "job.json"
    if not job.is_file():
        return
    try:
        known = json.loads(job.read_text(encoding="utf-8"))
        before, now = {**known["options"], "model": known["model"]}, {**identity["options"], "model": identity["model"]}
        differences = [
            f"--{name.replace('_', '-')} was {_show(before.get(name))}, now {_show(now.get(name))}"
            for name in sorted(before.keys() | now.keys())
            if _compared(before.get(name)) != _compared(now.get(name))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"{job}: is not a fluxcli job file; choose another -o") from error
    if differences:
        raise JobError(
            f"{directory} holds a job with other settings: {'; '.join(differences)}\n"
            "Use the same settings to go on, another -o, or --force to start over in a new directory."
        )


def _compared(value: Any) -> Any:
    return (value["fingerprint"], value["revision"]) if isinstance(value, dict) else value


def _show(value: Any) -> str:
    if isinstance(value, dict):
        revision = f" at {value['revision']}" if value["revision"] else ""
        return f"{value['name']}{revision} (weights {value['fingerprint'][:8]})"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def read_committed(directory: Path) -> dict[str, int]:
    """Ids in a job's manifest with a hash of their settings, good for this process.

    A look from outside, which mends and locks nothing.
    """
    return {
        row["id"]: _content(_settings_of_row(row))
        for row in read_rows(directory / "manifest.jsonl", *MANIFEST_KEYS, torn_ok=True)
    }


def read_failed(directory: Path) -> set[tuple[str | None, int]]:
    """(id, line) of every row in a job's failures.jsonl, seen from outside."""
    return {(row["id"], row["line"]) for row in read_rows(directory / "failures.jsonl", *FAILURE_KEYS, torn_ok=True)}


def committed_status(committed: dict[str, int]) -> Callable[[PromptRecord], str | None]:
    """`JobStore.status` over any such hashes."""

    def status(record: PromptRecord) -> str | None:
        content = committed.get(record.id)
        if content is None:
            return None
        if content != _content(_settings_of_record(record)):
            raise RowError(
                f"id {record.id} is committed with another prompt or other settings; give the changed row a new id",
                kind="changed_row",
                id=record.id,
            )
        return "done"

    return status


def record_settings(record: PromptRecord) -> dict[str, Any]:
    """The settings of one image, in manifest order: what its pixels depend on besides the job."""
    return {name: getattr(record, name) for name in _SETTINGS}


def _content(settings: tuple[Any, ...]) -> int:
    """A hash, good for this process. Not of the values themselves: Python's is the same for -1 and -2."""
    return hash(repr(settings))


@lru_cache(maxsize=1024)  # a batch's rows share a few stamps
def _nanoseconds(stamp: str) -> int:
    moment = datetime.fromisoformat(stamp)
    return int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000
