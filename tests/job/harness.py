"""A whole job on an engine that draws from seeds alone, run in forked processes that die where a test says.

Only the engine is made up; reading, planning, running and committing are the real ones. Nothing here imports torch.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fluxcli.core.config import EngineConfig, ImageFormat
from fluxcli.core.records import Batch, Images, ShapeKey, Timing, WarmUp
from fluxcli.job.job import Job
from fluxcli.models.checkpoints import resolve

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
ROWS = 11
BATCH = 4
SIZE = 64


class Flight:
    def __init__(self, pictures: Images) -> None:
        self._pictures = pictures

    def ready(self) -> bool:
        return False  # as a GPU: the next batch is queued before this one is looked at

    def result(self) -> Images:
        return self._pictures


class SeedEngine:
    """Pixels that depend on the seed alone. `broken` may raise, or change a batch's pictures, as a test wants."""

    def __init__(self, broken: Callable[[Batch, np.ndarray, list[bool]], None] = lambda *_: None) -> None:
        self._broken = broken
        self.batches: list[list[str]] = []

    def warm_up(self, keys: Iterable[ShapeKey], report: Callable[[WarmUp], None] = lambda one: None) -> list[WarmUp]:
        return [WarmUp(key, 0.0, 0, 0, "none") for key in keys]

    def submit(self, batch: Batch) -> Flight:
        self.batches.append([record.id for record in batch.records])
        pixels = np.stack([_draw(record.seed, record.height, record.width) for record in batch.records])
        finite = [True] * len(batch.records)
        self._broken(batch, pixels, finite)
        return Flight(Images(pixels, finite, Timing(0.1, 0.2, 0.3)))


def _draw(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_input(path: Path, rows: int = ROWS) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"picture {i}", "id": f"p{i}"}) + "\n" for i in range(rows)))
    return path


def job(input: Path, directory: Path, **options: Any) -> Job:
    checkpoint = resolve("tiny")
    settings = {"text_lengths": (64,), "image": ImageFormat(), "batch_size": BATCH, **options}
    defaults = checkpoint.row_defaults().__class__(SIZE, SIZE, 2, 3.5)
    return Job(str(input), directory, checkpoint, EngineConfig("cpu", "float32", False), defaults, **settings)


def run(input: Path, directory: Path, engine: SeedEngine | None = None, **options: Any) -> int:
    """The job's exit code."""
    made = job(input, directory, **options)
    status, _ = made.run(lambda shapes: engine or SeedEngine(), {"device": "seed", "versions": {}}, lambda text: None)
    return status


def forked(work: Callable[[], Any], kill_after: float | None = None) -> int:
    """Runs `work` in a child; its exit code, or the number of the signal that ended it as a negative."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is a failure, not a hung test run
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            work()
            os._exit(0)
        except BaseException:
            os._exit(99)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Every call by which the commit protocol touches the disk.
STEPS = ("mkdir", "open", "write", "utime", "fsync", "replace")


def arm(step: str, when: str, number: int) -> None:
    """Makes this process kill itself `when` ("before", "midway" or "after") the `number`-th call of a step of `os`.

    Midway leaves half of what a write was to write; of `open` only calls that make a file count.
    """
    calls = 0
    original = getattr(os, step)

    def fatal(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if step == "open" and not args[1] & os.O_CREAT:
            return original(*args, **kwargs)
        calls += 1
        if calls == number and when == "midway":
            original(args[0], args[1][: len(args[1]) // 2])
        if calls == number and when != "after":
            die()
        result = original(*args, **kwargs)
        if calls == number:
            die()
        return result

    setattr(os, step, fatal)


def manifest(directory: Path) -> list[dict[str, Any]]:
    path = directory / "manifest.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def essence(directory: Path) -> dict[str, Any]:
    """What must not depend on how often a job died: each id once, with its settings, hash and place."""
    rows = manifest(directory)
    told = {
        row["id"]: {key: row[key] for key in row if key not in ("timing", "run", "finished_at", "batch", "worker")}
        for row in rows
    }
    assert len(told) == len(rows), "an id stands in the manifest twice"
    return told
