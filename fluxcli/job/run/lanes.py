"""Where batches are made. A lane is one engine, with what it alone knows: which batches it has no memory for."""

from collections.abc import Callable, Iterable
from typing import Protocol

from fluxcli.core.errors import OutOfMemory
from fluxcli.core.records import Batch, Images, ShapeKey, WarmUp


class Flight(Protocol):
    """A batch on the device. `result` waits for it."""

    def ready(self) -> bool: ...
    def result(self) -> Images: ...


class Engine(Protocol):
    """What a lane needs of `fluxcli.engine.engine.Engine`."""

    def warm_up(self, keys: Iterable[ShapeKey], report: Callable[[WarmUp], None] = ...) -> list[WarmUp]: ...
    def submit(self, batch: Batch) -> Flight: ...


class LocalLane:
    """An engine in this process."""

    def __init__(self, engine: Engine, say: Callable[[str], None]) -> None:
        self._engine, self._say = engine, say
        self._limits: dict[ShapeKey, int] = {}  # shape, its batch size zeroed -> largest batch known to fit

    def warm_up(self, keys: Iterable[ShapeKey]) -> None:
        for key in keys:
            try:
                self._engine.warm_up([key], self._report)
            except OutOfMemory as error:
                self._halve(key, error)

    def submit(self, batch: Batch) -> Flight:
        """Queues a batch behind what the engine is doing.

        Raises:
            OutOfMemory: from then on `limit` is lower.
        """
        try:
            return self._engine.submit(batch)
        except OutOfMemory as error:
            self._halve(batch.key, error)
            raise

    def limit(self, key: ShapeKey) -> int:
        """The largest batch of this shape to try."""
        return self._limits.get(key._replace(batch_size=0), key.batch_size)

    def _halve(self, key: ShapeKey, error: OutOfMemory) -> None:
        limit = max(1, key.batch_size // 2)
        self._limits[key._replace(batch_size=0)] = limit
        if key.batch_size > 1:
            self._say(f"{error}: going on with batches of at most {limit}")

    def _report(self, one: WarmUp) -> None:
        if one.graphs:
            self._say(f"ready for {one.key}: {one.seconds:.1f} s, {one.state}, {one.attention} attention")
