"""A job's directory and its commit protocol: compute at least once, show each image exactly once.

A picture is written to a temporary file beside its place and fsynced, renamed into place, its directory fsynced; then
the batch's rows are appended to manifest.jsonl and fsynced. So a row in the manifest means a whole picture on disk,
whatever dies when. What a crash can leave behind - a temporary, a picture without a row, half a line - `JobStore`
clears or redoes at the next start.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fluxcli.errors import JobError, RowError
from fluxcli.records import Failure, PromptRecord

FILES_PER_DIRECTORY = 10_000
_TEMPORARY = ".tmp"
_HEARTBEAT = 15.0  # seconds
_DEAD_AFTER = 90.0


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
            self._lock = _Lock(directory)
            try:
                check_identity(directory, identity)
                self._recover(identity)
            except BaseException:
                self._lock.release()
                raise

    def close(self) -> None:
        self._lock.release()

    def status(self, record: PromptRecord) -> str | None:
        """ "done" where the record's image is committed, else None.

        Raises:
            RowError: an image is committed under this id from another prompt or other settings.
        """
        return committed_status(self._committed)(record)

    def failed_before(self, id: str | None, line: int) -> bool:
        return self._attempts.get(id or line, 0) > 0

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
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = final.with_name(f".{final.name}{_TEMPORARY}")
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
            for each in written:
                os.replace(each.temporary, each.final)
            for folder in {each.final.parent for each in written}:
                _fsync_directory(folder)
            _append(self._manifest_path, rows)
            for each in written:
                stray = self._orphans.pop(each.final.name, None)
                if stray is not None and stray != each.final:
                    stray.unlink(missing_ok=True)
        for row in rows:
            self._committed[row["id"]] = _content(row)

    def fail(self, failures: Iterable[Failure]) -> None:
        """Appends to failures.jsonl, numbering each row's attempts."""
        rows = []
        for failure in failures:
            key = failure.id or failure.line
            self._attempts[key] = attempt = self._attempts.get(key, 0) + 1
            rows.append({**failure.as_row(), "attempt": attempt, "run": self.run})
        with self._writing():
            _append(self._failures_path, rows)

    def record_run(self, row: dict[str, Any]) -> None:
        """Appends this start's row to runs.jsonl."""
        with self._writing():
            _append(self._runs_path, [{"run": self.run, **row}])

    def _recover(self, identity: dict[str, Any]) -> None:
        job = self.directory / "job.json"
        if not job.exists():
            for name in ("images", "manifest.jsonl"):
                if (self.directory / name).exists():
                    raise JobError(f"{self.directory}: has {name} but no job.json, so it is no job; choose another -o")
            _write_atomically(job, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        for path in (self._manifest_path, self._failures_path, self._runs_path):
            if cut := _cut_torn_line(path):
                self._say(f"{path}: cut off {cut} bytes of a line that a crash left unfinished")
        last_run = self._read_runs()
        self._read_failures()
        last_run = max(last_run, self._read_manifest())
        self.run = last_run + 1
        if crashed := self._lock.crashed_run:
            self._note_crash(crashed)
        self._lock.claim(self.run)

    def _read_manifest(self) -> int:
        """Takes in every row whose picture is there; drops the others, so that they are redone."""
        pictures, last_run = self._pictures(), -1
        self._committed: dict[str, bytes] = {}
        dropped: list[str] = []
        for row in _read_rows(self._manifest_path):
            last_run = max(last_run, row["run"])
            modified = pictures.pop(row["file_name"], None)
            if modified is None:
                dropped.append(f"{row['id']} (no picture)")
            elif modified != _nanoseconds(row["finished_at"]) and not self._unchanged(row):
                dropped.append(f"{row['id']} (picture altered)")
            elif row["id"] not in self._committed:
                self._committed[row["id"]] = _content(row)
        self._rows_at_start = len(self._committed) + len(dropped)
        self._orphans = {Path(name).name: self.directory / name for name in pictures}
        if dropped:
            gone = {each.partition(" ")[0] for each in dropped}
            kept = (row for row in _read_rows(self._manifest_path) if row["id"] not in gone)
            _write_atomically(self._manifest_path, "".join(f"{_dumps(row)}\n" for row in kept))
            shown = ", ".join(dropped[:3]) + (f" and {len(dropped) - 3} more" if len(dropped) > 3 else "")
            self._say(f"{self._manifest_path}: redoing {len(dropped)} rows: {shown}")
        return last_run

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
                    elif entry.name.startswith(".") and entry.name.endswith(_TEMPORARY):
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

    def _read_failures(self) -> None:
        self._attempts: dict[str | int, int] = {}
        for row in _read_rows(self._failures_path):
            self._attempts[row["id"] or row["line"]] = row["attempt"]

    def _read_runs(self) -> int:
        return max((row["run"] for row in _read_rows(self._runs_path)), default=-1)

    def _note_crash(self, owner: dict[str, Any]) -> None:
        self._say(
            f"{self.directory}: run {owner['run']} (pid {owner['pid']} on {owner['host']}) died; going on from there"
        )
        self.run = max(self.run, owner["run"] + 1)
        known = {row["run"] for row in _read_rows(self._runs_path)}
        if owner["run"] not in known:
            row = {"run": owner["run"], "host": owner["host"], "started_at": owner["started_at"], "exit_status": None}
            _append(self._runs_path, [row])

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
    return value["fingerprint"] if isinstance(value, dict) else value


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['name']} ({value['fingerprint'][:8]})"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def read_committed(directory: Path) -> dict[str, bytes]:
    """Ids in a job's manifest with a digest of their settings: a look from outside, which mends and locks nothing."""
    return {row["id"]: _content(row) for row in _read_rows(directory / "manifest.jsonl", torn_ok=True)}


def committed_status(committed: dict[str, bytes]) -> Callable[[PromptRecord], str | None]:
    """`JobStore.status` over any such digests."""

    def status(record: PromptRecord) -> str | None:
        content = committed.get(record.id)
        if content is None:
            return None
        if content != _content(record_settings(record)):
            raise RowError(
                f"id {record.id} is committed with another prompt or other settings; give the changed row a new id",
                kind="changed_row",
                id=record.id,
            )
        return "done"

    return status


def record_settings(record: PromptRecord) -> dict[str, Any]:
    """The settings of one image, in manifest order: what its pixels depend on besides the job."""
    return {
        "prompt": record.prompt,
        "seed": record.seed,
        "width": record.width,
        "height": record.height,
        "num_inference_steps": record.num_inference_steps,
        "guidance_scale": record.guidance_scale,
    }


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _content(row: dict[str, Any]) -> bytes:
    fields = [row[key] for key in ("prompt", "seed", "width", "height", "num_inference_steps", "guidance_scale")]
    return hashlib.blake2b(repr(fields).encode(), digest_size=16).digest()


def _nanoseconds(stamp: str) -> int:
    moment = datetime.fromisoformat(stamp)
    return int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000


def _dumps(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _json_line(row: dict[str, Any]) -> bytes:
    return f"{_dumps(row)}\n".encode()


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Appends rows in one write, on disk for sure."""
    data = b"".join(map(_json_line, rows))
    if not data:
        return
    new = not path.exists()
    with path.open("ab", buffering=0) as file:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    if new:
        _fsync_directory(path.parent)


def _read_rows(path: Path, torn_ok: bool = False) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if torn_ok and not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise JobError(f"{path}, line {number}: not a JSON row; mend or remove it, then run again") from error
            yield row


def _cut_torn_line(path: Path) -> int:
    """Cuts off what follows the last line end; returns the bytes removed."""
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


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync_directory(path.parent)


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Lock:
    """DIR/.lock: held through flock, which dies with its process; its text names the owner to whoever is refused."""

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
        self.crashed_run = self._owner()
        if self.crashed_run and self.crashed_run["host"] != socket.gethostname():
            # On shared storage flock need not reach other hosts: there the heartbeat tells a living owner from a dead
            # one.
            silence = self._seconds_since_heartbeat()
            if silence < _DEAD_AFTER:
                owner = self.crashed_run
                self._file.close()
                raise JobError(
                    f"{directory}: in use by pid {owner['pid']} on {owner['host']}, alive {max(0, silence):.0f} s ago; "
                    f"if that machine is gone, run again in {_DEAD_AFTER} s"
                )
        self._released = threading.Event()

    def claim(self, run: int) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started_at": utc_now(), "run": run}
        self._file.seek(0)
        self._file.truncate()
        self._file.write(_json_line(owner))
        self._file.flush()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def release(self) -> None:
        self._released.set()
        if not self._file.closed:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._file.close()

    def _beat(self) -> None:
        while not self._released.wait(_HEARTBEAT):
            with contextlib.suppress(OSError, ValueError):  # the disk is the commit's to complain about
                os.utime(self._file.fileno())

    def _seconds_since_heartbeat(self) -> float:
        """By the file server's clock, which need not be ours."""
        probe = self._path.with_name(f".lock-{os.getpid()}{_TEMPORARY}")
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
