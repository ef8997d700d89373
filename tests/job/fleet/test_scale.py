"""One process drives many workers: what a batch costs it, in time and in memory."""

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from fluxcli.job.fleet.fleet import Fleet
from fluxcli.job.output.store import JobStore
from tests.job import harness
from tests.job.fleet import fleets

WORKERS = 64


def driven(folder: Path, batches: int, size: int) -> dict[str, float]:
    """A job on workers whose images cost next to nothing, in a process of its own. Of that, from a tenth of the batches
    on: CPU seconds a batch, all threads; seconds a batch inside commits, which end in two syncs; MiB that it grew."""
    rows = fleets.write_rows(folder / "rows.jsonl", [f"image {n % 97}" for n in range(batches * size)])
    told, marks, committing = folder / "told", [], [0.0]
    wait, commit = Fleet.wait, JobStore.commit
    done = 0

    def waited(self: Fleet) -> Any:
        nonlocal done
        outcomes = wait(self)
        for _ in outcomes:
            done += 1
            if done in (batches // 10, batches):
                cpu = resource.getrusage(resource.RUSAGE_SELF)
                memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
                marks.append((cpu.ru_utime + cpu.ru_stime, committing[0], memory / 2**20, time.monotonic()))
        return outcomes

    def committed(self: JobStore, *args: Any) -> None:
        start = time.monotonic()
        commit(self, *args)
        committing[0] += time.monotonic() - start

    def work() -> None:
        Fleet.wait, JobStore.commit = waited, committed  # type: ignore[method-assign]
        job = harness.job(rows, folder / "job", batch_size=size)
        status, _ = job.run(fleets.fleet(WORKERS, blank=True), {"device": "seed", "versions": {}}, lambda text: None)
        assert status == 0
        told.write_text(json.dumps(marks))

    assert os.waitpid(fleets.started(work, seconds=3600), 0)[1] == 0
    (cpu, commits, memory, start), (cpu_end, commits_end, memory_end, end) = json.loads(told.read_text())
    count = batches - batches // 10
    assert len(harness.manifest(folder / "job")) == batches * size
    return {
        "ms of CPU a batch": 1e3 * (cpu_end - cpu) / count,
        "ms in commits a batch": 1e3 * (commits_end - commits) / count,
        "MiB grown": memory_end - memory,
        "images/s": count * size / (end - start),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("batches", "size"), [(100_000, 1), (2_000, 16)])
def test_a_batch_costs_the_job_under_two_milliseconds(batches: int, size: int, tmp_path: Path) -> None:
    figures = driven(tmp_path, batches, size)
    print(f"{WORKERS} workers, {batches} batches of {size}: " + ", ".join(f"{v:.3f} {k}" for k, v in figures.items()))
    if size == 1:
        assert figures["ms of CPU a batch"] < 2.0
    # What a start must know of each image that is done (its id, its settings' hash) is all that grows.
    assert figures["MiB grown"] * 2**20 < 400 * 0.9 * batches * size + 8 * 2**20
