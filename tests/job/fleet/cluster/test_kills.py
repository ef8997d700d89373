"""Actors and their job killed at random moments: nothing lost, nothing twice, nothing torn, nothing stray."""

import random
from pathlib import Path
from typing import Any

import pytest

from fluxcli.job.fleet.cluster.cluster import Cluster
from fluxcli.job.fleet.process import Workers
from tests.job import harness
from tests.job.fleet import test_kills
from tests.job.fleet.cluster.conftest import workers
from tests.job.fleet.test_kills import undisturbed  # noqa: F401, a fixture


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["shared", "unseen"])
def test_actors_and_jobs_killed_at_random_moments(
    folder: str,
    nodes: Any,
    undisturbed: tuple[Path, dict],  # noqa: F811
    tmp_path: Path,
) -> None:
    rows, expected = undisturbed
    moments = random.Random(folder)
    kills = jobs = drivers = 0

    def make(count: int, **settings: Any) -> Workers:
        return workers(Cluster(nodes.address), count, **settings)

    while kills < 50:
        directory, pids = tmp_path / str(jobs) / folder, tmp_path / "pids"
        directory.parent.mkdir()
        code, more = test_kills.killed(rows, directory, pids, moments, 0.1, seconds=0.15, make=make)
        kills, jobs, drivers = kills + more, jobs + 1, drivers + (code is None)
        assert code in (None, 0, 3), code
        test_kills.finish(rows, directory, pids, expected)
        assert harness.manifest(directory)
    print(f"{folder}: {kills} actors and {drivers} jobs killed in {jobs} jobs; lost 0, doubled 0")
