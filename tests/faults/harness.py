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

from fluxcli.core import files
from fluxcli.core.config import EngineConfig, ImageFormat
from fluxcli.core.records import Batch, Pictures, ShapeKey, Timing, WarmUp
from fluxcli.job.job import Job
from fluxcli.job.output import store
from fluxcli.models.checkpoints import resolve

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
ROWS = 11
BATCH = 4
SIZE = 64


class Flight:
    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures

    def ready(self) -> bool:
        return False  # as a GPU: the next batch is queued before this one is looked at

    def result(self) -> Pictures:
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
        return Flight(Pictures(pixels, finite, Timing(0.1, 0.2, 0.3)))


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
STEPS = ("mkdir", "write", "utime", "fsync", "replace", "fsync_directory", "append")


def arm(step: str, when: str, number: int) -> None:
    """Makes this process kill itself `when` ("before", "midway" or "after") the `number`-th call of a step.

    Midway leaves half of what a write was to write.
    """
    calls = 0

    def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and when == "before":
                die()
            result = function(*args, **kwargs)
            if calls == number and when == "after":
                die()
            return result

        return wrapped

    if step in ("write", "append"):
        original = Path.open
        mode = "wb" if step == "write" else "ab"

        def opened(self: Path, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            file = original(self, *args, **kwargs)
            if args and args[0] == mode:
                calls += 1
                if calls == number:
                    return _Dying(file, when)
            return file

        Path.open = opened  # type: ignore[method-assign, assignment]
    elif step == "mkdir":
        Path.mkdir = fatal(Path.mkdir)  # type: ignore[method-assign]
    elif step == "fsync_directory":
        store.fsync_directory = files.fsync_directory = fatal(files.fsync_directory)  # type: ignore[assignment]
    else:
        setattr(os, step, fatal(getattr(os, step)))


class _Dying:
    """A file whose first write is the last thing its process does."""

    def __init__(self, file: Any, when: str) -> None:
        self._file, self._when = file, when

    def __enter__(self) -> "_Dying":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        number: int = self._file.fileno()
        return number

    def write(self, data: bytes) -> None:
        part = {"before": b"", "midway": data[: len(data) // 2], "after": data}[self._when]
        self._file.write(part)
        self._file.flush()
        die()


def manifest(directory: Path) -> list[dict[str, Any]]:
    path = directory / "manifest.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def essence(directory: Path) -> dict[str, Any]:
    """What must not depend on how often a job died: each id once, with its settings, hash and place."""
    rows = manifest(directory)
    told = {
        row["id"]: {key: row[key] for key in row if key not in ("timing", "run", "finished_at", "batch")}
        for row in rows
    }
    assert len(told) == len(rows), "an id stands in the manifest twice"
    return told
