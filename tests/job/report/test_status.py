"""`fluxcli status`: done, failed, missing and the time left, while a job runs and after, and of older directories."""

import json
import re
from pathlib import Path

import pytest

from fluxcli.core.errors import JobError
from fluxcli.job.output.lock import Lock
from fluxcli.job.report.status import status
from fluxcli.job.report.verify import verify
from tests.conftest import read_rows
from tests.job import harness
from tests.job.harness import SeedEngine


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = harness.write_input(tmp_path / "rows.jsonl")
    path.write_text(path.read_text() + json.dumps({"id": "bad", "prompt": "b", "width": 100}) + "\n")
    return path


@pytest.fixture
def killed(rows: Path, tmp_path: Path) -> Path:
    """Killed when all but its last batch were committed, and one row is bad."""

    def work() -> None:
        class Dies(SeedEngine):
            def submit(self, batch):  # type: ignore[no-untyped-def]
                if len(self.batches) == 2:
                    while len(read_rows(tmp_path / "job" / "manifest.jsonl")) < 4:
                        pass
                    harness.os.kill(harness.os.getpid(), harness.signal.SIGKILL)
                return super().submit(batch)

        harness.run(rows, tmp_path / "job", Dies())

    assert harness.forked(work) == -9
    return tmp_path / "job"


def forget_input(directory: Path) -> None:
    values = json.loads((directory / "job.json").read_text())
    del values["input"]
    (directory / "job.json").write_text(json.dumps(values))


def test_what_is_planned_outlives_a_kill(killed: Path) -> None:
    found = status(killed)
    assert (found.images, found.failed, found.missing) == (4, 1, 8)
    assert verify(killed).missing == 8
    assert found.owner is not None and re.fullmatch(r"pid \d+ on .+", found.owner)
    harness.os.utime(killed / ".lock", (0, 0))
    assert status(killed).state == "died"


def test_a_finished_job_lacks_what_failed(rows: Path, tmp_path: Path) -> None:
    assert harness.run(rows, tmp_path / "job") == 3
    found = status(tmp_path / "job")
    assert (found.state, found.images, found.failed, found.missing) == ("stopped", 11, 1, 1)
    (run,) = read_rows(tmp_path / "job" / "runs.jsonl")
    assert found.images_per_s == run["images_per_s"]
    assert found.seconds_left == pytest.approx(1 / run["images_per_s"], abs=0.1)
    rows.write_text(rows.read_text().replace('"width": 100', '"width": 96'))
    assert harness.run(rows, tmp_path / "job") == 0
    found = status(tmp_path / "job")
    assert (found.state, found.images, found.failed, found.missing) == ("complete", 12, 0, 0)
    assert found.seconds_left is None


def test_a_running_jobs_time_goes_by_its_own_images(rows: Path, tmp_path: Path) -> None:
    harness.run(rows, tmp_path / "job")
    manifest = tmp_path / "job" / "manifest.jsonl"
    kept = read_rows(manifest)[:8]
    for number, row in enumerate(kept):  # two batches of four: the second ten seconds after the first
        row["finished_at"] = f"2026-01-01T00:00:{10 * (number // 4):02d}.000Z"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in kept))
    lock = Lock(tmp_path / "job")
    try:
        found = status(tmp_path / "job")
    finally:
        lock.release()
    assert (found.state, found.images, found.failed, found.missing) == ("running", 8, 1, 4)
    assert (found.images_per_s, found.seconds_left) == (0.4, 7.5), "three images to make, besides the bad row"
    assert "8 of 12 images, 1 failed, 4 missing; about 0:00:08 left at 0.40 images/s" in found.as_lines()


def test_a_directory_from_before_goes_by_its_last_run(rows: Path, tmp_path: Path) -> None:
    harness.run(rows, tmp_path / "job")
    forget_input(tmp_path / "job")
    assert status(tmp_path / "job").missing == verify(tmp_path / "job").missing == 0
    (tmp_path / "job" / "runs.jsonl").unlink()
    assert (status(tmp_path / "job").state, status(tmp_path / "job").missing) == ("unknown", None)
    assert verify(tmp_path / "job").missing is None


def test_no_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"there is no job\.json"):
        status(tmp_path)


def test_the_command_tells_as_text_and_as_data(rows: Path, tmp_path: Path, fluxcli) -> None:
    harness.run(rows, tmp_path / "job")
    told = fluxcli("status", "job")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("job: stopped\n11 of 12 images, 1 failed, 1 missing")
    data = fluxcli("status", "job", "--json").json
    assert (data["state"], data["missing"], data["input"]["rows"]) == ("stopped", 1, 12)
