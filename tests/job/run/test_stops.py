"""A job that is stopped before its first batch: one line, its row in runs.jsonl, no lock, and its exit code."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxcli.job.input.read import PromptFile
from fluxcli.job.run import signals
from tests.conftest import read_rows
from tests.job import harness


def stopped(job: Callable[[], Any], said: Path) -> int:
    """The exit code of a process that is the job's own; what it says goes to `said`."""

    def work() -> None:
        signals.install()
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        job()

    return harness.forked(work)


def run(rows: Path, directory: Path, make: Callable[[Any], Any], told: Path) -> None:
    def say(text: str) -> None:
        os.write(2, f"{text}\n".encode())

    def tell(status: int, totals: dict[str, Any]) -> None:
        told.write_text(f"{status} {totals['images']} {totals['done_before']}")

    harness.job(rows, directory).run(make, {"device": "seed", "versions": {}}, say, tell)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", ["reading", "loading", "warming up"])
def test_a_stop_before_the_first_batch(number: signal.Signals, phase: str, tmp_path: Path, monkeypatch) -> None:
    def kill() -> None:
        os.kill(os.getpid(), number)

    class Engine(harness.SeedEngine):
        def warm_up(self, keys: Any, report: Any = None) -> Any:
            kill()

    def make(shapes: Any) -> harness.SeedEngine:
        if phase == "loading":
            try:
                kill()
                raise AssertionError("the process goes on")
            except BaseException:
                os._exit(98)
        return Engine()

    rows, directory = harness.write_input(tmp_path / "rows.jsonl"), tmp_path / "job"
    assert harness.run(rows, directory, limit=3) == 0
    if phase == "reading":
        scan = PromptFile.scan

        def interrupted(self: PromptFile) -> Any:
            for row in scan(self):
                if row.number == 5:
                    kill()
                yield row

        monkeypatch.setattr(PromptFile, "scan", interrupted)
    said, told = tmp_path / "said", tmp_path / "told"
    assert stopped(lambda: run(rows, directory, make, told), said) == 128 + number
    lines = [line for line in said.read_text().splitlines(True) if not line.startswith("tiny ")]
    assert "".join(lines) == (
        f"stopped by {number.name}; everything finished is committed. Run the same command again to go on.\n"
    )
    assert told.read_text() == f"{128 + number} 0 3"
    assert [(row["run"], row["exit_status"]) for row in read_rows(directory / "runs.jsonl")] == [
        (0, 0),
        (1, 128 + number),
    ]
    assert not (directory / ".lock").exists()
    monkeypatch.undo()
    assert harness.run(rows, directory) == 0
    assert len(harness.essence(directory)) == harness.ROWS


def test_a_second_signal_leaves_amid_the_last_words(tmp_path: Path) -> None:
    rows = harness.write_input(tmp_path / "rows.jsonl")

    def say(text: str) -> None:
        if "stopped" in text:
            os.kill(os.getpid(), signal.SIGINT)

    def make(shapes: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    job = harness.job(rows, tmp_path / "job")
    assert stopped(lambda: job.run(make, {"device": "seed", "versions": {}}, say), tmp_path / "said") == 130
    assert harness.run(rows, tmp_path / "job") == 0
