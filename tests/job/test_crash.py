"""Killed at any moment, a job resumed is the job undisturbed: nothing lost, nothing twice, nothing stray."""

import os
import random
import signal
from pathlib import Path

import pytest

from fluxcli.job.report.verify import verify
from tests.job import harness

WHEN = {"write": ("before", "midway", "after")}
# Enough to reach every call of a run with three batches and eleven images, and a few beyond the last.
NUMBERS = {"mkdir": 3, "open": 20, "write": 18, "utime": 12, "fsync": 42, "replace": 13}
MATRIX = [
    (step, when, number)
    for step in harness.STEPS
    for when in WHEN.get(step, ("before", "after"))
    for number in range(1, NUMBERS[step] + 1)
]
FAST = random.Random(4).sample(MATRIX, 24)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = harness.write_input(folder / "rows.jsonl")
    assert harness.forked(lambda: harness.run(rows, folder / "job")) == 0
    return rows, harness.essence(folder / "job")


def finish(rows: Path, directory: Path, expected: dict) -> None:
    assert harness.forked(lambda: os._exit(harness.run(rows, directory))) == 0
    assert harness.essence(directory) == expected
    verdict = verify(directory)
    assert not verdict.problems
    stray = [path for path in directory.rglob("*") if path.name.startswith(".")]
    assert not stray


def crash(step: str, when: str, number: int, rows: Path, directory: Path, expected: dict) -> bool:
    def doomed() -> None:
        harness.arm(step, when, number)
        harness.run(rows, directory)

    ended = harness.forked(doomed)
    assert ended in (0, -signal.SIGKILL)
    finish(rows, directory, expected)
    return ended != 0


@pytest.mark.parametrize(("step", "when", "number"), FAST)
def test_a_crash_at_a_step_of_the_commit(step, when, number, undisturbed, tmp_path) -> None:
    crash(step, when, number, undisturbed[0], tmp_path / "job", undisturbed[1])


def test_the_crashes_really_happen(undisturbed, tmp_path) -> None:
    for step in harness.STEPS:
        assert crash(step, "before", 1, undisturbed[0], tmp_path / step, undisturbed[1]), f"{step} was never reached"


@pytest.mark.slow
def test_the_whole_crash_matrix(undisturbed, tmp_path) -> None:
    crashed = [crash(*case, undisturbed[0], tmp_path / "-".join(map(str, case)), undisturbed[1]) for case in MATRIX]
    print(f"{len(MATRIX)} runs, {sum(crashed)} of them killed; lost 0, duplicated 0")
    assert sum(crashed) > 150


@pytest.mark.slow
def test_two_hundred_crashes_at_random_moments(undisturbed, tmp_path) -> None:
    moments = random.Random(0)
    for case in range(50):
        directory = tmp_path / str(case)
        for _ in range(4):  # killed again and again on the way
            harness.forked(lambda to=directory: harness.run(undisturbed[0], to), kill_after=moments.uniform(0, 0.5))
        finish(undisturbed[0], directory, undisturbed[1])


def test_a_few_crashes_at_random_moments(undisturbed, tmp_path) -> None:
    moments = random.Random(1)
    for _ in range(5):
        harness.forked(lambda: harness.run(undisturbed[0], tmp_path / "job"), kill_after=moments.uniform(0, 0.5))
    finish(undisturbed[0], tmp_path / "job", undisturbed[1])
