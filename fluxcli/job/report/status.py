"""`fluxcli status`: how far a job is, from its files alone, as it runs or after. Takes no lock, changes nothing."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fluxcli.core.errors import JobError
from fluxcli.core.terminal import counted, printable_line
from fluxcli.job.output import lock
from fluxcli.job.output.committed import briefs
from fluxcli.job.output.identity import Given, read_identity
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import FailureRow, ManifestRow, RunRow
from fluxcli.job.report.text import clock


@dataclass(frozen=True)
class Status:
    """How far a job is. `missing` are the images that its last input still lacks, failed ones among them; None where
    nobody wrote down how many there should be. `failed` are rows that failed and have no image, `owner` who is at work
    there. `images_per_s` and `seconds_left` are None where there is nothing to go by."""

    directory: str
    state: Literal["running", "complete", "stopped", "died", "unknown"]
    images: int
    failed: int
    missing: int | None
    images_per_s: float | None
    seconds_left: float | None
    input: dict[str, Any] | None
    owner: str | None = None

    def as_data(self) -> dict[str, Any]:
        return asdict(self)

    def as_lines(self) -> str:
        by = f" ({self.owner})" if self.owner else ""
        if self.missing is None:
            line = f"{counted(self.images, 'image')}, {self.failed} failed, nobody knows how many missing"
        else:
            all = self.images + self.missing
            line = f"{self.images} of {counted(all, 'image')}, {self.failed} failed, {self.missing} missing"
        if self.seconds_left is not None:
            line += f"; about {clock(self.seconds_left)} left at {self.images_per_s:.2f} images/s"
        return f"{printable_line(self.directory)}: {self.state}{by}\n{line}"


def status(directory: Path) -> Status:
    """Looks at a job.

    Raises:
        JobError: the directory holds no job, or a file of it is damaged.
    """
    identity = read_identity(directory)
    if identity is None:
        raise JobError(f"{directory}: holds no job: there is no job.json in it")
    owner, running = lock.owner(directory), lock.heard_lately(directory)
    failed: set[tuple[str | None, int]] = set()
    for _, failure in RowLog(directory / "failures.jsonl", FailureRow).read():
        if failure is not None:
            failed.add((failure.id, 0 if failure.id else failure.line))
    images, rate = _made(RowLog(directory / "manifest.jsonl", ManifestRow), failed)
    last = None
    for _, run in RowLog(directory / "runs.jsonl", RunRow).read():
        last = run or last
    missing = missing_of(identity.input, last, images)
    still_failed = len(failed) if missing is None else min(len(failed), missing)
    if last is not None and last.images_per_s and not (owner and running):
        rate = last.images_per_s
    todo = (missing or 0) - (still_failed if owner and running else 0)
    return Status(
        directory=str(directory),
        state=_state(owner is not None, running, missing),
        images=images,
        failed=still_failed,
        missing=missing,
        images_per_s=None if rate is None else round(rate, 4),
        seconds_left=round(todo / rate, 1) if rate and todo > 0 else None,
        input=asdict(identity.input) if identity.input else None,
        owner=str(owner) if owner else None,
    )


def missing_of(given: Given | None, last: RunRow | None, images: int) -> int | None:
    """Images that a job still lacks, having `images`: by its input, or, in a directory of before those were written
    down, by the last run's own count; None where neither says."""
    if given is not None:
        return max(0, given.images - images)
    if last is None or last.planned is None:
        return None
    return max(0, last.planned - (last.images or 0))


def _state(
    owned: bool, running: bool, missing: int | None
) -> Literal["running", "complete", "stopped", "died", "unknown"]:
    if owned and running:
        return "running"
    if missing == 0:
        return "complete"
    if owned:
        return "died"
    return "unknown" if missing is None else "stopped"


def _made(log: "RowLog[ManifestRow]", failed: set[tuple[str | None, int]]) -> tuple[int, float | None]:
    """Images, and how many of the last run's came in a second once its first batch was there; takes those that have an
    image out of `failed`."""
    images, run, of_run, first, begun, ended = 0, -1, 0, 0, 0, 0
    for number, brief in briefs(log):
        if brief is None:
            continue
        id, _, _, _, finished, row_run, line = brief
        images += 1
        failed.discard((id, 0))
        if row_run != run:
            size = (log.parse(number, line).batch or {}).get("size")
            run, of_run, first = row_run, 0, size if isinstance(size, int) else 1
        of_run += 1
        if of_run <= first:
            begun = finished
        ended = finished
    seconds = (ended - begun) / 10**9
    return images, (of_run - first) / seconds if of_run > first and seconds > 0 else None
