"""Jobs on worker processes that draw from seeds."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxcli.job.fleet.deadlines import Patience
from fluxcli.job.fleet.process import Workers, local
from fluxcli.job.report.verify import verify
from tests.conftest import read_rows
from tests.job import harness


def fleet(count: int, patience: Patience | None = None, **settings: Any) -> Workers:
    names = [f"worker {number}" for number in range(count)]
    more = {} if patience is None else {"patience": patience}
    return Workers(settings, names, local("tests.job.fleet.drawing", [{}] * count), **more)


def run(rows: Path, directory: Path, workers: Workers, **options: Any) -> int:
    """The job's exit code."""
    made = harness.job(rows, directory, **options)
    status, _ = made.run(workers, {"device": "seed", "versions": {}}, lambda text: None)
    return status


def write_rows(path: Path, prompts: list[str], sizes: tuple[int, ...] = (64,)) -> Path:
    rows = [{"id": f"p{n}", "prompt": prompt, "width": sizes[n % len(sizes)]} for n, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alone(rows: Path, directory: Path) -> dict[str, Any]:
    """What one process makes of the rows."""
    assert harness.run(rows, directory) in (0, 3)
    return harness.essence(directory)


def check(directory: Path, expected: dict[str, Any]) -> None:
    """That nothing is lost, doubled, torn or stray."""
    assert harness.essence(directory) == expected
    assert not verify(directory).problems
    assert not [path for path in directory.rglob("*") if path.name.startswith(".")]


def check_replaced(
    job: Path, rows: Path, workers: Any, once: Path, how: str, reason: str, expected: Any, capsys: Any
) -> None:
    """That a worker which misbehaves in this way is replaced, for this reason, and costs nothing."""
    once.touch()
    assert run(rows, job, workers) == 0
    check(job, expected)
    (row,) = read_rows(job / "runs.jsonl")
    deaths, starts = (sum(worker[name] for worker in row["workers"]) for name in ("deaths", "starts"))
    assert starts == 2 + deaths and (deaths == 1 or how == "freeze")  # on a busy machine others are slow too
    told = [line for line in capsys.readouterr().err.splitlines() if line.endswith("; starting another")]
    assert len(told) == deaths and reason in told[0]


def gone(pids: Path, seconds: float = 10.0) -> bool:
    """Whether the processes that a file names are, within some seconds."""
    end = time.monotonic() + seconds
    while any(alive(int(pid)) for pid in pids.read_text().split()):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def started(work: Callable[[], object], seconds: int = 60) -> int:
    """The pid of a process that does the work, quietly, and ends with 0; with 99 where it fails, by itself where it
    takes longer than it may."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return child
