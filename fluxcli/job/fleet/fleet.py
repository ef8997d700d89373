"""A job's worker processes: started, given batches, heard, ended when they die, hang or talk nonsense, and replaced.

A batch is one worker's until that worker tells what became of it or is no more; then what it wrote is litter. Only the
job's own process renames files and appends rows, and only for a worker that holds the batch.
"""

import os
import selectors
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from fluxcli.core.config import ImageFormat
from fluxcli.core.errors import FluxcliError
from fluxcli.core.records import PromptRecord, ShapeKey, WarmUp
from fluxcli.job.fleet.deadlines import Deadlines
from fluxcli.job.fleet.process import Spawned, Workers, how
from fluxcli.job.fleet.wire import Garbage
from fluxcli.job.fleet.worker import LastWords, Worker
from fluxcli.job.output.store import JobStore
from fluxcli.job.plan import Plan
from fluxcli.job.run.lanes import ENCODERS, Failed, Made
from fluxcli.job.run.queue import ByShape, Queue

_WAIT = 0.5  # seconds at most between looks at signals and deadlines
_FRUITLESS = 3  # starts in a row
_ENDING = 1.0  # seconds in which a process that closed its line tells how it ended
_LEAVING = 10.0  # seconds for all to leave in peace


@dataclass(frozen=True)
class Destination:
    """Where images go: into whose directory, in which format and with which model's name in them, each to its place,
    which is asked when its batch is handed out."""

    store: JobStore
    format: ImageFormat
    model: str
    place: Callable[[PromptRecord], str]


class Fleet:
    """Lanes in processes of their own. As a context it leaves none of them, and none of their litter.

    Args:
        shapes: every one that they will have to run.
        destination: None where they are to make no images.
        report: told of each shape that one of them made ready.

    Raises:
        FluxcliError: none can be started, in their own words.
    """

    def __init__(
        self,
        workers: Workers,
        shapes: Sequence[ShapeKey],
        destination: Destination | None,
        say: Callable[[str], None],
        report: Callable[[WarmUp], None] = lambda one: None,
    ) -> None:
        self._destination, self._say = destination, say
        self._selector = selectors.DefaultSelector()
        self._lost: list[str] = []  # temporaries of batches that were taken back
        self._told: list[Made | Failed] = []
        self._stopping, self._stopped_at = False, 0.0
        encoders = workers.encoders or max(1, min(ENCODERS, (os.cpu_count() or 1) // len(workers.names)))
        start = {
            "kind": "start",
            "settings": workers.settings,
            "shapes": shapes,
            "images": destination and _plain(destination, encoders),
        }
        place, sink = (destination.place, destination.store.sink) if destination else (None, None)
        shared = (start, place, sink, Deadlines(workers.patience), say, report)
        self._workers = [
            Worker(number, name, partial(workers.spawn, number), *shared) for number, name in enumerate(workers.names)
        ]
        self._say(f"starting {_counted(len(self._workers))}: {', '.join(workers.names)}")
        try:
            for worker in self._workers:
                self._start(worker)
            while not any(worker.begun for worker in self._workers):
                self._look()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
                end = time.monotonic() + _LEAVING
                while self._running() and time.monotonic() < end:
                    self._look()
        finally:
            self._end()

    def queue(self, plan: Plan) -> Queue:
        return ByShape(plan)

    def free(self) -> Sequence[Worker]:
        return sorted((worker for worker in self._workers if worker.room), key=lambda worker: len(worker.leases))

    def wait(self) -> Sequence[Made | Failed]:
        self._look()
        told, self._told = self._told, []
        return told

    def finish(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._stopped_at = time.monotonic()
            for worker in self._running():
                if worker.begun:
                    worker.stop()
                else:
                    self._close(worker)

    @property
    def busy(self) -> bool:
        return bool(self._told) or any(worker.leases for worker in self._workers)

    def hosts(self) -> set[str | None]:
        """Machines that its workers are on; None among them while it is not known of all."""
        return {worker.host for worker in self._running()}

    def describe(self) -> list[dict[str, Any]]:
        now = self._stopped_at or time.monotonic()
        return [
            {
                "worker": worker.number,
                "name": worker.name,
                "host": worker.facts.host,
                "device": worker.facts.device,
                "batches": worker.facts.batches,
                "images": worker.facts.images,
                "images_per_s": round(worker.facts.images / worker.seconds(now), 4),
                "device_s": round(worker.facts.device_s, 3),
                "busy": round(worker.facts.device_s / worker.seconds(now), 4),
                "warm_up_s": round(worker.facts.warm_up_s, 3),
                "starts": worker.facts.starts,
                "deaths": worker.facts.deaths,
            }
            for worker in self._workers
        ]

    def pulse(self) -> str:
        """How the workers are, in a few words."""
        now = self._stopped_at or time.monotonic()
        rates = [worker.facts.images / worker.seconds(now) for worker in self._workers if worker.first_begun]
        each = f", {min(rates):.2f} to {max(rates):.2f} images/s each" if len(rates) > 1 else ""
        replaced = sum(worker.facts.starts - 1 for worker in self._workers)
        return _counted(len(rates)) + each + (f", {replaced} replaced" if replaced else "")

    def _running(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.process is not None]

    def _start(self, worker: Worker) -> None:
        try:
            process = worker.start()
        except OSError as error:
            raise FluxcliError(f"{worker.name} cannot be started: {error.strerror}") from error
        self._selector.register(process.wire, selectors.EVENT_READ, partial(self._hear, worker))
        if process.words is not None:
            self._selector.register(process.words, selectors.EVENT_READ, partial(self._listen, process))

    def _look(self) -> None:
        """Takes in what there is, or comes within a moment, and ends who is silent for too long."""
        for worker in self._running():
            self._watch(worker)
        # Before they are heard: this process may have been stopped for hours, and they not.
        now = time.monotonic()
        for key, _ in self._selector.select(_WAIT):
            if self._selector.get_map().get(key.fd) is key:  # else it was ended by what came before
                key.data()
        for worker in self._running():
            if (silence := worker.silence(now)) > worker.patience:
                self._lose(worker, f"gave no answer for {silence:.0f} s")

    def _watch(self, worker: Worker) -> None:
        assert worker.process is not None
        wire = worker.process.wire
        key = self._selector.get_key(wire)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wire.unsent else 0)
        if events != key.events:
            self._selector.modify(wire, events, key.data)

    def _listen(self, process: Spawned) -> None:
        if not process.listen():
            assert process.words is not None
            self._selector.unregister(process.words)

    def _hear(self, worker: Worker) -> None:
        assert worker.process is not None
        worker.process.wire.flush()
        try:
            for message in worker.process.wire.receive():
                told = worker.hear(message)
                if told is not None:
                    self._told.append(told)
        except EOFError:
            self._gone(worker)
        except Garbage as error:
            self._lose(worker, f"sent {error}")
        except LastWords as words:
            if words.disk is not None:
                number, text, name = words.disk
                assert self._destination is not None
                raise self._destination.store.bar(OSError(number, text, name or None)) from None
            if words.fault == "user":
                raise FluxcliError(str(words)) from None
            self._lose(worker, str(words), _ENDING)

    def _gone(self, worker: Worker) -> None:
        """A worker whose line is closed: at the end of the job in peace, else dead."""
        assert worker.process is not None
        status = worker.process.end(_ENDING)
        if self._stopping and status == 0:
            self._close(worker)
            return
        words = worker.process.last_words()
        self._lose(worker, how(status) + (f" ({words})" if words else ""))

    def _lose(self, worker: Worker, reason: str, patience: float = 0.0) -> None:
        """Ends a worker and takes back what it held; another takes its place, unless that is hopeless."""
        leases = [*worker.leases.values()]
        self._close(worker, patience)
        worker.facts.deaths += 1
        if not any(lease.alone for lease in leases):
            worker.facts.fruitless += 1
        for lease in leases:
            self._told.append(Failed(lease.batch, "worker_died", f"{worker.name} died twice of it: {reason}"))
        if self._stopping:
            return
        if worker.facts.fruitless < _FRUITLESS:
            self._say(f"{worker.name}: {reason}; starting another")
            self._start(worker)
            return
        told = f"{worker.name}: {reason}; {_FRUITLESS} starts in a row finished no batch"
        if not self._running():
            raise FluxcliError(f"{told}. No worker is left; nothing committed is lost")
        self._say(f"{told}, so the others go on without it")

    def _close(self, worker: Worker, patience: float = 0.0) -> None:
        """Ends a process and forgets it; what it held and did not save is litter."""
        process = worker.process
        if process is None:
            return
        for each in (process.wire, process.words):
            if each is not None and each in self._selector.get_map():
                self._selector.unregister(each)
        process.end(patience)
        process.close()
        worker.process, worker.begun = None, 0.0
        litter = [temporary for lease in worker.leases.values() for _, temporary in lease.places]
        self._lost.extend(litter)
        worker.leases.clear()
        self._sweep(litter)

    def _sweep(self, temporaries: Sequence[str]) -> None:
        for temporary in temporaries:
            assert self._destination is not None
            try:
                self._destination.store.sink.discard(temporary)
            except OSError:  # the disk is the commit's to complain about
                return

    def _end(self) -> None:
        for worker in self._running():
            self._close(worker)
        self._sweep(self._lost)  # again: a process that could not be killed may have written since
        self._selector.close()


def _plain(destination: Destination, encoders: int) -> dict[str, Any]:
    """A destination as `serve` reads it."""
    return {
        "directory": str(destination.store.directory.absolute()),
        "suffix": destination.format.suffix,
        "format": (destination.format.name, destination.format.quality),
        "model": destination.model,
        "encoders": encoders,
    }


def _counted(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"
