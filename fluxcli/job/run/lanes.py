"""Where batches are made. A lane is one engine, with what it alone knows: which batches it has no memory for. A job
drives the lane of its own process, or those of others (`job.fleet`)."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol

from fluxcli.core.errors import FluxcliError, OutOfMemory, first_line
from fluxcli.core.records import Adapters, Batch, Images, PromptRecord, ShapeKey, Timing, WarmUp
from fluxcli.job.plan import Plan
from fluxcli.job.run.queue import InOrder, Queue
from fluxcli.job.run.writing import Place, Saving, Writer

ENCODERS = min(8, os.cpu_count() or 1)  # threads


class Flight(Protocol):
    """A batch on the device. `result` waits for it."""

    def ready(self) -> bool: ...
    def result(self) -> Images: ...


class Engine(Protocol):
    """What a lane needs of `fluxcli.engine.engine.Engine`."""

    def warm_up(self, keys: Iterable[ShapeKey], report: Callable[[WarmUp], None] = ...) -> list[WarmUp]: ...
    def submit(self, batch: Batch) -> Flight: ...


@dataclass(frozen=True, slots=True)
class Made:
    """A batch whose images are on their way to the disk. `worker` is the number of the process that made it, None for
    the job's own."""

    batch: Batch
    timing: Timing
    saved: Saving
    worker: int | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A batch that came to nothing. `kind` as in failures.jsonl: out_of_memory, engine_error or worker_died."""

    batch: Batch
    kind: str
    message: str


class Lane(Protocol):
    """One engine."""

    @property
    def idle(self) -> bool:
        """Whether it holds no batch."""

    @property
    def adapters(self) -> Adapters:
        """Those of the batch that it was given last."""

    def ready(self, key: ShapeKey) -> bool:
        """Whether batches of this shape need no getting ready here."""

    def limit(self, key: ShapeKey) -> int:
        """The largest batch of this shape to try."""

    def submit(self, batch: Batch, *, alone: bool = False) -> None:
        """Queues a batch, behind which no other is to be queued where it is to run `alone`."""


class Lanes(Protocol):
    """All of a job's. As a context they end with it."""

    def __enter__(self) -> "Lanes": ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def queue(self, plan: Plan) -> Queue:
        """The order in which they take a plan's batches."""

    def free(self) -> Sequence[Lane]:
        """Those that can be given a batch now, idle ones first."""

    def wait(self) -> "Sequence[Made | Failed]":
        """What became of batches, after waiting a little where nothing did yet.

        Raises:
            FluxcliError: nothing more can be done.
        """

    def finish(self) -> None:
        """Says that nothing more will be submitted."""

    @property
    def busy(self) -> bool:
        """Whether any batch is not told of yet."""

    def describe(self) -> list[dict[str, Any]]:
        """What each process did, for runs.jsonl; nothing of the job's own."""


class LocalLane(Generic[Place]):
    """An engine in this process: one batch on the device, another queued behind it.

    Args:
        place: where an image is to go, asked when its batch is done.
    """

    def __init__(
        self, engine: Engine, writer: Writer[Place], place: Callable[[PromptRecord], Place], say: Callable[[str], None]
    ) -> None:
        self._engine, self._writer, self._place, self._say = engine, writer, place, say
        self._limits: dict[ShapeKey, int] = {}  # shape, its batch size zeroed -> largest batch known to fit
        self._flights: deque[tuple[Batch, Flight]] = deque()
        self._failed: list[Failed] = []
        self.adapters: Adapters = ()

    def __enter__(self) -> "LocalLane[Place]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def warm_up(self, keys: Iterable[ShapeKey]) -> list[WarmUp]:
        """Those that fit in memory, made ready."""
        ready = []
        for key in keys:
            try:
                ready += self._engine.warm_up([key], self._report)
            except OutOfMemory as error:
                self._halve(key, error)
        return ready

    def queue(self, plan: Plan) -> Queue:
        return InOrder(plan)

    def free(self) -> "Sequence[LocalLane[Place]]":
        """A batch that is done is told of before the next is queued, which on a CPU is the whole of its work."""
        full = self._failed or len(self._flights) > 1 or (self._flights and self._flights[0][1].ready())
        return [] if full else [self]

    @property
    def idle(self) -> bool:
        return not self._flights

    @property
    def busy(self) -> bool:
        return bool(self._flights or self._failed)

    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return bool(self._failed) or any(flight.ready() for _, flight in self._flights)

    def ready(self, key: ShapeKey) -> bool:
        return True

    def limit(self, key: ShapeKey) -> int:
        return self._limits.get(key._replace(batch_size=0), key.batch_size)

    def submit(self, batch: Batch, *, alone: bool = False) -> None:
        self.adapters = batch.adapters
        try:
            self._flights.append((batch, self._engine.submit(batch)))
        except Exception as error:
            self._failed.append(self._fault(batch, error))

    def wait(self) -> list[Made | Failed]:
        told: list[Made | Failed] = [*self._failed]
        self._failed.clear()
        if self._flights:
            batch, flight = self._flights.popleft()
            try:
                result = flight.result()
            except Exception as error:
                told.append(self._fault(batch, error))
            else:
                saved = self._writer.start(batch, result, [self._place(record) for record in batch.records])
                told.append(Made(batch, result.timing, saved))
        return told

    def finish(self) -> None:
        pass

    def describe(self) -> list[dict[str, Any]]:
        return []

    def _fault(self, batch: Batch, error: Exception) -> Failed:
        """What a smaller batch, or another row, may cure; anything else is raised."""
        if isinstance(error, OutOfMemory):
            self._halve(batch.key, error)
            return Failed(batch, "out_of_memory", first_line(error))
        if isinstance(error, FluxcliError):
            raise error
        return Failed(batch, "engine_error", first_line(error))

    def _halve(self, key: ShapeKey, error: OutOfMemory) -> None:
        limit = max(1, key.batch_size // 2)
        self._limits[key._replace(batch_size=0)] = limit
        if key.batch_size > 1:
            self._say(f"{error}: going on with batches of at most {limit}")

    def _report(self, one: WarmUp) -> None:
        if one.graphs:
            self._say(f"ready for {one.key}: {one.seconds:.1f} s, {one.state}, {one.attention} attention")
