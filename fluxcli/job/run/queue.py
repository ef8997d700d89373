"""What is left of a plan, and which batch a lane takes next."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fluxcli.core.records import Adapters, ShapeKey
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
    @property
    def adapters(self) -> Adapters: ...
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
    have it. Of a shape it goes on with the adapters that it has; then takes some that no lane has had; then the most
    numerous. Suspects come last, to idle lanes."""

    def __init__(self, plan: Plan) -> None:
        self._left: dict[ShapeKey, dict[Adapters, deque[PlannedBatch]]] = {}
        for batch in sorted(plan, key=lambda batch: batch.key._replace(batch_size=1).tokens(), reverse=True):
            self._of(batch).append(batch)
        self._untaken = dict.fromkeys(self._left)  # largest first
        self._takers: dict[ShapeKey, int] = {}
        self._had: set[Adapters] = set()  # by any lane
        self._suspects: deque[Work] = deque()
        self._batches = len(plan)

    def __len__(self) -> int:
        return self._batches + len(self._suspects)

    def take(self, lane: Taker) -> Work | None:
        if not self._left:
            return self._suspects.popleft() if self._suspects and lane.idle else None
        ready = [key for key in self._left if lane.ready(key)]
        going_on = (key for key in ready if lane.adapters in self._left[key])
        key = next(going_on, None) or next(iter(ready), None) or self._another()
        sets = self._left[key]
        adapters = lane.adapters
        if adapters not in sets:
            most = max(sets, key=lambda each: len(sets[each]))
            adapters = next((each for each in sets if each not in self._had), most)
        self._had.add(adapters)
        batch = sets[adapters].popleft()
        self._batches -= 1
        if not sets[adapters]:
            del sets[adapters]
        if not sets:
            del self._left[key]
            self._untaken.pop(key, None)
        return Work(batch)

    def give_back(self, works: Iterable[Work]) -> None:
        for work in reversed([*works]):
            if work.suspect:
                self._suspects.append(work)
            else:
                self._of(work.planned).appendleft(work.planned)
                self._batches += 1

    def _of(self, batch: PlannedBatch) -> deque[PlannedBatch]:
        """What is left of a batch's kind."""
        return self._left.setdefault(batch.key, {}).setdefault(batch.adapters, deque())

    def _another(self) -> ShapeKey:
        key = next(iter(self._untaken), None) or max(self._left, key=self._share)
        self._untaken.pop(key, None)
        self._takers[key] = self._takers.get(key, 0) + 1
        return key

    def _share(self, key: ShapeKey) -> float:
        """Work left for each that takes it, in tokens times steps."""
        sets = [*self._left[key].values()]
        batches, steps = sum(map(len, sets)), sets[0][0].num_inference_steps
        return batches * key.tokens() * steps / (self._takers.get(key, 0) + 1)
