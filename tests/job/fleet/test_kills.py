"""Workers and their job killed at random moments: nothing lost, nothing twice, nothing torn, nothing stray."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxcli.job.fleet.process import Workers
from tests.conftest import read_rows
from tests.job import harness
from tests.job.fleet import fleets

ROWS = 60
WORKERS = 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = fleets.write_rows(folder / "rows.jsonl", [f"image {n}" for n in range(ROWS)], sizes=(64, 80))
    return rows, fleets.alone(rows, folder / "job")


def killed(
    rows: Path,
    directory: Path,
    pids: Path,
    moments: random.Random,
    job_too: float,
    seconds: float = 0.03,
    make: Callable[..., Workers] = fleets.fleet,
) -> tuple[int | None, int]:
    """Runs the job, killing workers, and with probability `job_too` the job itself; its exit code, or None where it was
    killed, and how many workers were."""
    pids.write_text("")

    def work() -> None:
        os._exit(fleets.run(rows, directory, make(WORKERS, pids=str(pids), seconds=seconds)))

    child = fleets.started(work, seconds=120)
    kills = 0
    while True:
        time.sleep(moments.uniform(0, 0.2))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return (None if code == -signal.SIGKILL else code), kills
        living = [pid for pid in map(int, pids.read_text().split()) if fleets.alive(pid)]
        if len(living) < WORKERS:  # kills that come faster than starts would end the job, and should
            continue
        if moments.random() < job_too:
            os.kill(child, signal.SIGKILL)
        else:
            os.kill(moments.choice(living), signal.SIGKILL)
            kills += 1


def finish(rows: Path, directory: Path, pids: Path, expected: dict) -> int:
    """How many rows the run before took to be deadly."""
    assert fleets.gone(pids, 5.0)
    convicted = len(read_rows(directory / "failures.jsonl"))
    assert fleets.run(rows, directory, fleets.fleet(2)) == 0
    fleets.check(directory, expected)
    return convicted


@pytest.mark.slow
def test_some_workers_killed_at_random_moments(undisturbed, tmp_path) -> None:
    rows, expected = undisturbed
    code, kills = killed(rows, tmp_path / "job", tmp_path / "pids", random.Random(3), 0.0, seconds=0.15)
    assert code == 0 and kills, (code, kills)
    fleets.check(tmp_path / "job", expected)


def test_workers_and_the_job_killed_at_random_moments(undisturbed, tmp_path) -> None:
    rows, expected = undisturbed
    moments = random.Random(4)
    for _ in range(3):
        killed(rows, tmp_path / "job", tmp_path / "pids", moments, 0.5)
    finish(rows, tmp_path / "job", tmp_path / "pids", expected)


@pytest.mark.slow
def test_two_hundred_workers_killed_at_random_moments(undisturbed, tmp_path) -> None:
    rows, expected = undisturbed
    moments = random.Random(0)
    kills = jobs = drivers = convicted = 0
    while kills < 200:
        directory, pids = tmp_path / str(jobs), tmp_path / "pids"
        code, more = killed(rows, directory, pids, moments, 0.1, seconds=0.15)
        kills, jobs, drivers = kills + more, jobs + 1, drivers + (code is None)
        assert code in (None, 0, 3), code
        convicted += finish(rows, directory, pids, expected)
        assert harness.manifest(directory)
    print(f"{kills} workers and {drivers} drivers killed in {jobs} jobs; lost 0, doubled 0; convicted {convicted} rows")
