"""How long a worker may be silent before it is taken for hung."""

from dataclasses import dataclass

from fluxcli.core.records import ShapeKey


@dataclass(frozen=True)
class Patience:
    """Seconds: the least that is waited for a worker to start, to get a shape ready, to make and save a batch. Beyond
    them `times` what the same has taken so far: a hang is rare, and a worker ended for nothing costs its batches."""

    start: float = 3600.0
    warm_up: float = 1800.0
    batch: float = 600.0
    times: float = 10.0


class Deadlines:
    """Learns from all workers what each of them may take."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._starts = 0.0
        self._warm_ups: dict[ShapeKey, float] = {}
        self._steps: dict[ShapeKey, float] = {}  # seconds a step, encoding and decoding included

    def started(self, seconds: float) -> None:
        self._starts = max(self._starts, seconds)

    def warmed(self, key: ShapeKey, seconds: float) -> None:
        self._warm_ups[key] = max(self._warm_ups.get(key, 0.0), seconds)

    def made(self, key: ShapeKey, steps: int, seconds: float) -> None:
        self._steps[key] = max(self._steps.get(key, 0.0), seconds / steps)

    def start(self) -> float:
        return max(self._patience.start, self._patience.times * self._starts)

    def warm_up(self, key: ShapeKey) -> float:
        return max(self._patience.warm_up, self._patience.times * self._warm_ups.get(key, 0.0))

    def batch(self, key: ShapeKey, steps: int) -> float:
        """For a shape that no worker has made yet, as long as for getting it ready."""
        known = self._steps.get(key)
        if known is None:
            return max(self._patience.batch, self._patience.warm_up)
        return max(self._patience.batch, self._patience.times * known * steps)
