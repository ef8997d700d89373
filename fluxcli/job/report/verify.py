"""`fluxcli verify`: is the directory what its manifest says? Every image is read, decoded and hashed again, and nothing
is held of a row but a few bytes."""

import hashlib
import os
import stat
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxcli.core.errors import JobError
from fluxcli.core.files import kind_of
from fluxcli.core.terminal import counted
from fluxcli.job.output import lock, rows, sound
from fluxcli.job.output.identity import Given, read_identity
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import BadRow, FailureRow, ManifestRow, R, Row, RunRow
from fluxcli.job.output.sink import Entry, FileSink
from fluxcli.job.output.store import leftovers
from fluxcli.job.report import mend
from fluxcli.job.report.status import missing_of

_AHEAD = 64  # images that may wait to be looked at
_PART = 2**16  # hashes compared at once


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be. Kinds: torn_line, bad_row, duplicate_row, missing_image, altered_image,
    undecodable_image, wrong_size, orphan, temporary, not_a_file, bad_job, bad_lock."""

    kind: str
    file_name: str
    id: str | None
    detail: str


_Looked = tuple[Problem | None, ManifestRow | None]


@dataclass
class Verdict:
    """What was found. `images` counts good rows with good images, `missing` those that the job still lacks, None where
    nobody wrote down how many there should be. By file and line number: `dropped` are rows whose images are to be
    made again, `moved` lines that are no rows, `mended` lines to be written as they should be, of images with the
    SHA-256 that is to stand there, or None."""

    directory: Path
    images: int = 0
    missing: int | None = None
    problems: list[Problem] = field(default_factory=list)
    dropped: dict[str, set[int]] = field(default_factory=dict)
    moved: dict[str, set[int]] = field(default_factory=dict)
    mended: dict[str, dict[int, str | None]] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        return {
            "directory": _text(str(self.directory)),
            "ok": not self.problems,
            "images": self.images,
            "missing": self.missing,
            "counts": dict(Counter(problem.kind for problem in self.problems)),
            "problems": [{**asdict(problem), "file_name": _text(problem.file_name)} for problem in self.problems],
        }

    def as_lines(self, shown: int = 20) -> str:
        lines = [f"{problem.kind}: {_line(problem.file_name)}: {problem.detail}" for problem in self.problems[:shown]]
        if len(self.problems) > shown:
            lines.append(f"and {len(self.problems) - shown} more problems")
        still = f", {self.missing} still to make" if self.missing else ""
        lines.append(
            f"{self.directory}: {counted(self.images, 'good image')}, {counted(len(self.problems), 'problem')}{still}"
        )
        return "\n".join(lines)


def logs(directory: Path) -> list[RowLog[Any]]:
    """A job's files of rows, the manifest first."""
    kinds: list[tuple[str, type[Row]]] = [("manifest", ManifestRow), ("failures", FailureRow), ("runs", RunRow)]
    return [RowLog(directory / f"{name}.jsonl", kind) for name, kind in kinds]


def require_job(directory: Path) -> None:
    if not os.path.lexists(directory / "job.json"):
        raise JobError(f"{directory}: holds no job: there is no job.json in it")


def verify(directory: Path) -> Verdict:
    """Looks at everything and changes nothing.

    Raises:
        JobError: the directory holds no job, or cannot be read.
    """
    require_job(directory)
    verdict = Verdict(directory)
    try:
        with closing(FileSink(directory, "")) as sink:
            _Look(verdict, sink).all()
    except OSError as error:
        raise JobError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error
    return verdict


class _Look:
    """One pass over a directory."""

    def __init__(self, verdict: Verdict, sink: FileSink) -> None:
        self._verdict, self._sink, self._directory = verdict, sink, verdict.directory
        self._files, self._named, self._ids = _Hashes(), _Hashes(), _Hashes()
        self._given: Given | None = None
        self._last: RunRow | None = None

    def all(self) -> None:
        self._files_of_the_job()
        manifest, failures, runs = logs(self._directory)
        self._each_file(self._file)  # before the rows, which a running job writes after its images
        if self._is_file(manifest.path):
            self._manifest(manifest)
            unnamed = self._files - self._named
            if unnamed:
                self._each_file(lambda folder, entry: self._orphan(folder, entry, unnamed))
        for log in (failures, runs):
            if self._is_file(log.path):
                for _, row, _ in self._rows(log):
                    self._last = row if isinstance(row, RunRow) else self._last
        self._verdict.missing = missing_of(self._given, self._last, self._verdict.images)

    def _note(self, kind: str, file_name: str, detail: str, id: str | None = None) -> None:
        self._verdict.problems.append(Problem(kind, file_name, id, detail))

    def _files_of_the_job(self) -> None:
        try:
            identity = read_identity(self._directory)
            self._given = identity.input if identity else None
        except JobError as error:
            self._note("bad_job", "job.json", f"{str(error).partition(': ')[2]}; fluxcli cannot mend it")
        if wrong := lock.problem_with(self._directory):
            self._note("bad_lock", ".lock", wrong)
        for path in leftovers(self._directory):
            self._note("temporary", path.name, "left behind by a crash")

    def _is_file(self, path: Path) -> bool:
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(mode):
            self._note("not_a_file", path.name, f"is {kind_of(mode)} where fluxcli keeps a file")
        return stat.S_ISREG(mode)

    def _each_file(self, look: Callable[[str, Entry], None]) -> None:
        for folder in self._sink.folders():
            for entry in self._sink.entries(folder):
                look(folder, entry)

    def _file(self, folder: str, entry: Entry) -> None:
        name = folder + entry.name
        if entry.kind == "image":
            self._files.add(name)
        elif entry.kind == "temporary":
            self._note("temporary", name, "no row in the manifest speaks of it")
        elif stat.S_ISREG(entry.mode):
            self._note("orphan", name, "no name that fluxcli gives; --repair leaves it alone")
        else:
            self._note("not_a_file", name, f"is {kind_of(entry.mode)}, and no image")

    def _orphan(self, folder: str, entry: Entry, unnamed: set[int]) -> None:
        if entry.kind == "image" and _hash(folder + entry.name) in unnamed:
            self._note("orphan", folder + entry.name, "no row in the manifest speaks of it")

    def _rows(self, log: RowLog[R]) -> Iterator[tuple[int, R, str | None]]:
        """Every row by its line's number, with what was wrong with it where it could be mended; notes the others."""
        name, number = log.path.name, 0
        for number, line in log.lines():
            wrong = None
            try:
                row: R | None = rows.read(log.kind, line)
            except BadRow as error:
                wrong, row = str(error), mend.mended(log.kind, line)
            if row is None:
                self._note("bad_row", name, f"line {number} {wrong}")
                self._verdict.moved.setdefault(name, set()).add(number)
                continue
            if wrong is not None:
                self._verdict.mended.setdefault(name, {})[number] = None
                if log.kind is not ManifestRow:
                    self._note("bad_row", name, f"line {number} {wrong}; --repair puts it right")
            yield number, row, wrong
        if log.torn():
            self._note("torn_line", name, f"line {number + 1} has no end")
            self._verdict.dropped.setdefault(name, set())

    def _manifest(self, log: RowLog[ManifestRow]) -> None:
        dropped = self._verdict.dropped.setdefault(log.path.name, set())
        mended = self._verdict.mended.setdefault(log.path.name, {})
        for number, row, wrong, looked in self._checked(self._rows(log)):
            problem, whole = looked.result()
            self._named.add(row.file_name)
            if wrong is not None:
                right = "" if whole is None else "; --repair puts it right"
                self._note("bad_row", log.path.name, f"line {number} {wrong}{right}", row.id)
            if problem is not None:
                self._verdict.problems.append(problem)
            if whole is None:
                dropped.add(number)
                mended.pop(number, None)
                continue
            if whole.sha256 != row.sha256:
                mended[number] = whole.sha256
            self._ids.add(row.id)
            self._verdict.images += 1
        if doubled := self._ids.doubled():
            self._doubles(log, doubled)

    def _checked(
        self, found: Iterable[tuple[int, ManifestRow, str | None]]
    ) -> Iterator[tuple[int, ManifestRow, str | None, Future[_Looked]]]:
        """Rows with the looks at their images, a few of which are taken ahead."""
        with ThreadPoolExecutor() as readers:
            ahead: deque[tuple[int, ManifestRow, str | None, Future[_Looked]]] = deque()
            for number, row, wrong in found:
                ahead.append((number, row, wrong, readers.submit(_check_image, self._sink, row)))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft()
            yield from ahead

    def _doubles(self, log: RowLog[ManifestRow], doubled: set[int]) -> None:
        """Notes all good rows of an id but the first."""
        name = log.path.name
        dropped, mended = self._verdict.dropped[name], self._verdict.mended[name]
        moved = self._verdict.moved.get(name, set())
        first: set[str] = set()
        for number, line in log.lines():
            if number in dropped or number in moved:
                continue
            row = mend.row_of(ManifestRow, line)
            if row is None or _hash(row.id) not in doubled:
                continue
            if row.id in first:
                self._note("duplicate_row", name, f"line {number}: the id has a row already", row.id)
                dropped.add(number)
                mended.pop(number, None)
                self._verdict.images -= 1
            first.add(row.id)


def _check_image(sink: FileSink, row: ManifestRow) -> _Looked:
    """What is wrong with a row's image, and the row that would be right; None where the image is to be made again."""

    def wrong(kind: str, detail: str) -> Problem:
        return Problem(kind, row.file_name, row.id, detail)

    try:
        descriptor = sink.open(row.file_name)
    except OSError as error:
        return wrong("missing_image", str(error.strerror)), None
    with open(descriptor, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        try:
            size, unsound = sound.size_of(file), None
        except sound.Unsound as error:
            size, unsound = (0, 0), str(error)
    altered = sha256 != row.sha256
    if altered and size == (row.width, row.height):
        detail = "its SHA-256 is not the row's, yet it is a whole image of that size: --repair keeps it"
        return wrong("altered_image", detail), replace(row, sha256=sha256)
    if altered:
        return wrong("altered_image", "its SHA-256 is not the row's"), None
    if unsound:
        return wrong("undecodable_image", unsound), None
    if size != (row.width, row.height):
        return wrong("wrong_size", f"is {size[0]}x{size[1]}, its row says {row.width}x{row.height}"), None
    return None, row


class _Hashes:
    """Strings too many to hold: their hashes, eight bytes each."""

    def __init__(self) -> None:
        self._all = array("Q")

    def add(self, text: str) -> None:
        self._all.append(_hash(text))

    def __sub__(self, other: "_Hashes") -> set[int]:
        here, there = self._ordered(), other._ordered()
        lacking: set[int] = set()
        for start in range(0, len(here), _PART):
            part = here[start : start + _PART]
            at = np.searchsorted(there, part)
            found = at < len(there)
            found[found] = there[at[found]] == part[found]
            lacking.update(part[~found].tolist())
        return lacking

    def doubled(self) -> set[int]:
        ordered = self._ordered()
        return set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())

    def _ordered(self) -> "np.ndarray[Any, np.dtype[np.uint64]]":
        """Them all, sorted where they lie."""
        view = np.frombuffer(self._all, np.uint64) if self._all else np.empty(0, np.uint64)
        view.sort()
        return view


def _hash(text: str) -> int:
    return hash(text) & 0xFFFF_FFFF_FFFF_FFFF


def _text(name: str) -> str:
    """A file's name as text, though its bytes need not be UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _line(name: str) -> str:
    return name if name.isprintable() else rows.shown(_text(name))
