"""Which way of doing a thing is fastest on this machine: a table from the name of a problem to that of a way.

Every way computes the same; which is fastest depends on shape, GPU and versions, so they are timed, once per problem,
while `tuning`. A table belongs to one engine; the compile cache keeps it for the next process.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, TypeVar

import torch

from fluxcli.core.errors import Remark, first_line
from fluxcli.engine.runtime import stopwatch
from fluxcli.engine.runtime.graphs import aside, record

if TYPE_CHECKING:
    from fluxcli.engine.runtime.graphs import Pool

Result = TypeVar("Result")
Way = Callable[[], object]
Settle = Callable[[str, Callable[[object], bool], Callable[[], str]], str]

FAULTS = (torch.OutOfMemoryError, torch.AcceleratorError)  # the device's, which say nothing of the way that met them

_NEAR = 1.05  # ways that take longer than this times the fastest, called once, are not timed further
_TURN_S = 0.06  # longer turns come nearer to the clock of a step, and make warming up longer
_ROUNDS = 3
_CALLS = 4  # in the graph that is timed


class Tuner:
    """The table and what fills it.

    Args:
        device: "cuda:N"; on a CPU nothing is ever timed.
        known: an earlier process's table.
        settle: asked for a problem's way, given what tells whether one can be taken, and what times them: another
            process may have timed it meanwhile. By default nobody has.
    """

    def __init__(
        self,
        device: str,
        known: Mapping[str, object] | None = None,
        settle: Settle = lambda problem, taken, timed: timed(),
    ) -> None:
        self._device, self._settle = device, settle
        self._tuning = False
        self._told: set[str] = set()
        self.table = {problem: way for problem, way in (known or {}).items() if isinstance(way, str)}

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Every problem that is met while the block runs is settled by timing its ways, if the table has none for it.
        What is captured in the block must have run before."""
        self._tuning = True
        try:
            yield
        finally:
            self._tuning = False

    def run(
        self,
        problem: str,
        ways: Mapping[str, Callable[[], Result]],
        rehearsal: Callable[[], Mapping[str, Way]] | None = None,
    ) -> Result:
        """What the fastest way returns; the first way where the table knows none and nothing is tuned.

        Args:
            problem: names everything that the choice depends on: the ways that are there, by their releases, too.
            ways: by their names, which begin with a library's. The first surely runs; another that fails, whatever it
                raises, is left out with one remark.
            rehearsal: the ways to time instead, where calling one leaves a trace.
        """
        sure = next(iter(ways))
        chosen = self.table.get(problem, "")
        if chosen not in ways and self._tuning:
            timed = partial(self._timed, rehearsal or (lambda: ways))
            chosen = self.table[problem] = self._settle(problem, ways.__contains__, timed)
        elif chosen not in ways:
            chosen = sure
        if chosen != sure:
            try:
                return ways[chosen]()
            except FAULTS:
                raise
            except Exception as error:
                self._leave_out(chosen, error)
                self.table[problem] = sure
        return ways[sure]()

    def _timed(self, rehearsal: Callable[[], Mapping[str, Way]]) -> str:
        """The name of the fastest way."""
        ways = rehearsal()
        if len(ways) == 1:
            return next(iter(ways))
        with aside():
            able = {name: way for number, (name, way) in enumerate(ways.items()) if self._runs(name, way, not number)}
            torch.cuda.empty_cache()
            pool = torch.cuda.graph_pool_handle()  # one result's memory for all
            replays = {name: _recorded(way, pool) for name, way in able.items()}
            once = {name: stopwatch.seconds(replay, 2, self._device) for name, replay in replays.items()}
            best = [name for name in once if once[name] <= _NEAR * min(once.values())]
            if len(best) == 1:
                return best[0]
            times = stopwatch.interleaved({name: replays[name] for name in best}, self._device, _TURN_S, _ROUNDS)
        return min(best, key=lambda name: median(times[name]))

    def _runs(self, name: str, way: Way, sure: bool) -> bool:
        try:
            way()
        except FAULTS:
            raise
        except Exception as error:
            if sure:
                raise
            self._leave_out(name, error)
            return False
        return True

    def _leave_out(self, name: str, error: Exception) -> None:
        """Mostly a release of an optional package that does not go with this torch or GPU. Told once a library."""
        library = name.partition(" ")[0]
        if library not in self._told:
            self._told.add(library)
            message = f"{library} cannot do here what it is there for, and is left out: {first_line(error)}"
            warnings.warn(message, Remark, stacklevel=2)


def _recorded(way: Way, pool: "Pool") -> Way:
    """A replay of `_CALLS` calls, as a step makes them: launching takes some longer than others."""

    def calls() -> None:
        for _ in range(_CALLS):
            way()

    replay: Way = record(calls, pool).replay
    return replay
