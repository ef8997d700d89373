"""`fluxcli verify`: is the directory what its manifest says? Every picture is read, decoded and hashed again."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from fluxcli.core.errors import JobError
from fluxcli.core.files import TEMPORARY, read_rows, write_atomically
from fluxcli.job.output.lock import Lock
from fluxcli.job.output.store import FAILURE_KEYS, MANIFEST_KEYS, RUN_KEYS

_MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it should be. Kinds: torn_line, bad_row, duplicate_row, missing_image, altered_image,
    undecodable_image, wrong_size, orphan, temporary."""

    kind: str
    file_name: str
    id: str | None
    detail: str


@dataclass
class Verdict:
    """What was found. `images` counts good rows with good pictures, `missing` what the last run left to make by its own
    count; `good_lines` are the line numbers worth keeping, by file."""

    directory: Path
    images: int = 0
    missing: int = 0
    problems: list[Problem] = field(default_factory=list)
    good_lines: dict[str, set[int]] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "ok": not self.problems,
            "images": self.images,
            "missing": self.missing,
            "counts": dict(Counter(problem.kind for problem in self.problems)),
            "problems": [asdict(problem) for problem in self.problems],
        }

    def as_lines(self, shown: int = 20) -> str:
        lines = [f"{problem.kind}: {problem.file_name}: {problem.detail}" for problem in self.problems[:shown]]
        if len(self.problems) > shown:
            lines.append(f"and {len(self.problems) - shown} more problems")
        still = f", {self.missing} images of the last run's input still to make" if self.missing else ""
        lines.append(f"{self.directory}: {self.images} good images, {len(self.problems)} problems{still}")
        return "\n".join(lines)


def verify(directory: Path) -> Verdict:
    """Looks at everything and changes nothing.

    Raises:
        JobError: the directory holds no job.
    """
    _require_job(directory)
    verdict = Verdict(directory)
    files = sorted((directory / "images").rglob("*"))  # before the rows, which a running job writes after its pictures
    rows = list(_rows(directory / _MANIFEST, verdict, MANIFEST_KEYS))
    good = verdict.good_lines.get(_MANIFEST, set())
    ids: set[str] = set()
    named: set[str] = set()
    with ThreadPoolExecutor() as readers:
        for (number, row), found in zip(rows, readers.map(partial(_check_picture, directory), rows), strict=True):
            problem = found
            named.add(row["file_name"])
            if row["id"] in ids:
                problem = Problem("duplicate_row", _MANIFEST, row["id"], f"line {number}: the id has a row already")
            if problem is not None:
                verdict.problems.append(problem)
                good.discard(number)
            else:
                ids.add(row["id"])
    verdict.images = len(ids)
    for path in files:
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in named:
            kind = "temporary" if path.name.endswith(TEMPORARY) else "orphan"
            verdict.problems.append(Problem(kind, name, None, "no row in the manifest speaks of it"))
    for _ in _rows(directory / "failures.jsonl", verdict, FAILURE_KEYS):
        pass
    for _, row in _rows(directory / "runs.jsonl", verdict, RUN_KEYS):
        verdict.missing = max(0, row.get("planned", 0) - row.get("images", 0))
    return verdict


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keeps jobs out of the directory while the block runs: what `repair` removes must not change after the look.

    Raises:
        JobError: the directory holds no job, or one is running in it.
    """
    _require_job(directory)
    lock = Lock(directory)
    try:
        yield
    finally:
        lock.release()


def repair(verdict: Verdict) -> None:
    """Removes what the next run will redo: rows without a good picture, pictures without a good row, broken lines. To
    be called `alone`, as the `verify` before it."""
    directory = verdict.directory
    for name, good in verdict.good_lines.items():
        with (directory / name).open("rb") as file:
            kept = (line.decode() for number, line in enumerate(file, start=1) if number in good)
            write_atomically(directory / name, kept)
    named = {row["file_name"] for row in read_rows(directory / _MANIFEST)}
    for problem in verdict.problems:
        if problem.file_name.startswith("images/") and problem.file_name not in named:
            (directory / problem.file_name).unlink(missing_ok=True)


def _require_job(directory: Path) -> None:
    if not (directory / "job.json").is_file():
        raise JobError(f"{directory}: holds no job: there is no job.json in it")


def _rows(path: Path, verdict: Verdict, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole rows of a file, by line number; notes the others as problems."""
    if not path.exists():
        return
    good = verdict.good_lines.setdefault(path.name, set())
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            problem = _check_line(path.name, number, line, keys)
            if problem is None:
                good.add(number)
                yield number, json.loads(line)
            else:
                verdict.problems.append(problem)


def _check_line(name: str, number: int, line: bytes, keys: Sequence[str]) -> Problem | None:
    if not line.endswith(b"\n"):
        return Problem("torn_line", name, None, f"line {number} has no end")
    try:
        lacking = [key for key in keys if key not in json.loads(line)]
    except (ValueError, TypeError):
        return Problem("bad_row", name, None, f"line {number} is not a JSON object")
    return Problem("bad_row", name, None, f"line {number} has no {lacking[0]}") if lacking else None


def _check_picture(directory: Path, numbered: tuple[int, dict[str, Any]]) -> Problem | None:
    _, row = numbered
    name, id = row["file_name"], row["id"]
    try:
        data = (directory / name).read_bytes()
    except OSError as error:
        return Problem("missing_image", name, id, str(error.strerror))
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return Problem("altered_image", name, id, "its SHA-256 is not the row's")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size = image.size
    except (OSError, SyntaxError, ValueError) as error:
        return Problem("undecodable_image", name, id, str(error))
    if size != (row["width"], row["height"]):
        return Problem("wrong_size", name, id, f"is {size[0]}x{size[1]}, its row says {row['width']}x{row['height']}")
    return None
