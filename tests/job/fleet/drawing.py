"""A worker process that draws from seeds alone and misbehaves as its settings say: `python -m tests.job.fleet.drawing`.

how, at     what to do at the row of this id: one of `MISBEHAVIOUR`
once        a file: who finds it there removes it and misbehaves, and no other does
wrong       the id of a row that cannot be drawn
most        rows that fit in memory
start       what goes wrong before that
seconds     that a batch takes
pids, log   files to note every process in, and every shape that is made ready
visible     a file to note its GPUs in
"""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fluxcli.core.errors import DeviceError, ModelError, OutOfMemory
from fluxcli.core.records import Batch, Images, ShapeKey, Timing
from fluxcli.job.fleet.cluster.actor import Mailbox
from fluxcli.job.fleet.serve import serve
from fluxcli.job.output.sink import FileSink, Written
from tests.job.harness import Flight, SeedEngine

PATIENCE = 0.5  # seconds, of the tests with a worker that hangs


class Landed(Flight):
    def ready(self) -> bool:
        return True


class Engine(SeedEngine):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(self._broken_by)
        self._settings = settings
        if pids := settings.get("pids"):
            with open(pids, "a") as file:
                file.write(f"{os.getpid()}\n")
        if visible := settings.get("visible"):
            with open(visible, "a") as file:
                file.write(f"{os.environ['CUDA_VISIBLE_DEVICES']}\n")
        self._once = Path(settings["once"]) if "once" in settings else None

    def warm_up(self, keys: Any, report: Any = lambda one: None) -> Any:
        keys = [*keys]
        if log := self._settings.get("log"):
            with open(log, "a") as file:
                file.writelines(f"{sys.argv[1]} {key}\n" for key in keys)
        if self._settings.get("deadly") in map(str, keys):
            die()
        return super().warm_up(keys, report)

    def submit(self, batch: Batch) -> Landed:
        time.sleep(self._settings.get("seconds", 0.0))
        while starts := self._settings.get("starts"):
            if Path(starts).exists() and len(Path(starts).read_text()) == 3:
                break
            time.sleep(0.01)
        if self._settings.get("blank"):
            count, one = len(batch.records), batch.records[0]
            pixels = np.zeros((count, one.height, one.width, 3), np.uint8)
            return Landed(Images(pixels, [True] * count, Timing(0.1, 0.2, 0.3)))
        return Landed(super().submit(batch).result())

    def _broken_by(self, batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        ids = {record.id for record in batch.records}
        if len(ids) > self._settings.get("most", 1024):
            raise OutOfMemory("no room")
        if self._settings.get("wrong") in ids:
            raise ValueError("cannot draw this")
        if self._settings.get("at") in ids and self._first():
            MISBEHAVIOUR[self._settings["how"]]()

    def _first(self) -> bool:
        try:
            if self._once is not None:
                self._once.unlink()
        except FileNotFoundError:
            return False
        return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise DeviceError("the device failed at 4 x 64x64")


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def babble() -> None:
    os.write(int(sys.argv[2]), b"\x00\x00\x00\x05hello")


def boast() -> None:
    """Of a batch that is another's, or nobody's."""
    os.write(int(sys.argv[2]), _framed(b'{"kind":"done","lease":0,"timing":[0,0,0],"saved":[]}'))
    os.write(int(sys.argv[2]), _framed(b'{"kind":"done","lease":999,"timing":[0,0,0],"saved":[]}'))


def mumble() -> None:
    """To Ray."""
    Mailbox.send = lambda self, message: self._outbox.put(("hello", []))  # type: ignore[method-assign]


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def haunt() -> None:
    """Freezes amid writing, and leaves a process behind that outlives the worker's end, keeps its line, and goes on
    writing and answering when the batch is long another's."""
    real = FileSink.put

    def late(self: FileSink, *args: Any) -> Any:
        if os.fork() == 0:
            os.setsid()
            time.sleep(2.0 * PATIENCE)
            Path(os.environ["HAUNTED"]).write_text(real(self, *args).temporary)
            with contextlib.suppress(OSError):
                babble()
            os._exit(0)
        freeze()

    FileSink.put = late  # type: ignore[method-assign]


def lie() -> None:
    """Tells of images that it never wrote."""
    FileSink.put = lambda self, name, data, temporary=None: Written(  # type: ignore[method-assign]
        temporary, name, "0" * 64, "2026-01-01T00:00:00.000Z"
    )


def fill() -> None:
    """The disk."""

    def full(self: FileSink, name: str, data: bytes, temporary: str | None = None) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    FileSink.put = full  # type: ignore[method-assign]


MISBEHAVIOUR: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (die, fail, freeze, babble, boast, mumble, haunt, lie, fill)
}


def engine(settings: dict[str, Any], shapes: list[ShapeKey], say: Any) -> tuple[Engine, str]:
    start = settings.get("start")
    if start == "exit":
        print("no such driver", file=sys.stderr)
        os._exit(7)
    if start == "model":
        raise ModelError("--model x: its weights are not what they should be")
    if start == "hang":
        time.sleep(600)
    if start == f"broken {sys.argv[1]}":
        with open(settings["starts"], "a") as file:
            file.write("x")
        raise DeviceError("this GPU is broken")
    return Engine(settings), "seed"


if __name__ == "__main__":
    serve(engine)
