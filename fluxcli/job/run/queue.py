"""What is left of a plan, and which batch a lane takes next."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fluxcli.core.records import ShapeKey
from fluxcli.job.plan import Plan, PlannedBatch


@dataclass(frozen=True, slots=True)
class Work:
    """A batch to make. `deaths` of workers that held it in this size; a `suspect` held by one that died runs alone."""

    planned: PlannedBatch
    deaths: int = 0
    suspect: bool = False


class Taker(Protocol):
    """What is asked of a lane that takes work."""

    @property
    def idle(self) -> bool: ...
    def ready(self, key: ShapeKey) -> bool: ...


class Queue(Protocol):
    def __len__(self) -> int: ...

    def take(self, lane: Taker) -> Work | None:
        """Hands a batch out; None where there is none for this lane now."""

    def give_back(self, works: Iterable[Work]) -> None:
        """Takes batches, in their order, that are to be made next."""


class InOrder:
    """The plan's own order."""

    def __init__(self, plan: Plan) -> None:
        self._fresh, self._back = iter(plan), deque[Work]()
        self._left = len(plan)

    def __len__(self) -> int:
        return self._left

    def take(self, lane: Taker) -> Work | None:
        if not self._left:
            return None
        self._left -= 1
        return self._back.popleft() if self._back else Work(next(self._fresh))

    def give_back(self, works: Iterable[Work]) -> None:
        back = [*works]
        self._left += len(back)
        self._back.extendleft(reversed(back))


class ByShape:
    """For several lanes, each of which gets as few shapes ready as it can: of the shapes it has ready it takes the
    largest; where those are used up, one that no lane has; then a share of the one with the most work for those who
    have it. Suspects come last, to idle lanes."""

    def __init__(self, plan: Plan) -> None:
        self._left: dict[ShapeKey, deque[PlannedBatch]] = {}
        for batch in plan:
            self._left.setdefault(batch.key, deque()).append(batch)
        self._untaken = dict.fromkeys(self._left)  # in the plan's order: largest first
        self._takers: dict[ShapeKey, int] = {}
        self._suspects: deque[Work] = deque()
        self._batches = len(plan)

    def __len__(self) -> int:
        return self._batches + len(self._suspects)

    def take(self, lane: Taker) -> Work | None:
        if not self._left:
            return self._suspects.popleft() if self._suspects and lane.idle else None
        key = next(filter(lane.ready, self._left), None) or self._another()
        batches = self._left[key]
        batch = batches.popleft()
        self._batches -= 1
        if not batches:
            del self._left[key]
            self._untaken.pop(key, None)
        return Work(batch)

    def give_back(self, works: Iterable[Work]) -> None:
        for work in reversed([*works]):
            if work.suspect:
                self._suspects.append(work)
            else:
                self._left.setdefault(work.planned.key, deque()).appendleft(work.planned)
                self._batches += 1

    def _another(self) -> ShapeKey:
        key = next(iter(self._untaken), None) or max(self._left, key=self._share)
        self._untaken.pop(key, None)
        self._takers[key] = self._takers.get(key, 0) + 1
        return key

    def _share(self, key: ShapeKey) -> float:
        """Work left for each that takes it, in tokens times steps."""
        batches = self._left[key]
        return len(batches) * key.tokens() * batches[0].num_inference_steps / (self._takers.get(key, 0) + 1)
