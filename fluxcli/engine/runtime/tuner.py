"""What was found fastest on this machine: a table from the name of a problem to that of a way to do it.

Every way computes the same; which is fastest depends on shape, GPU and versions, so they are timed, once per problem,
while `tuning`. The table is the process's; the compile cache keeps it for the next one.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from statistics import median

import torch

from fluxcli.core.errors import Remark
from fluxcli.engine.runtime import stopwatch
from fluxcli.engine.runtime.graphs import Pool, aside, record

Way = Callable[[], object]

FAULTS = (torch.OutOfMemoryError, torch.AcceleratorError)  # the device's, which say nothing of the way that met them

_FINALISTS = 3
_TURN_S = 0.06  # longer turns come nearer to the clock of a step, and make warming up longer
_CALLS = 4  # in the graph that is timed

_table: dict[str, str] = {}
_tuning = False


@contextmanager
def tuning() -> Iterator[None]:
    """Every problem that is met while the block runs is settled by timing its ways, if the table has none for it. What
    is captured in the block must have run before."""
    global _tuning
    _tuning = True
    try:
        yield
    finally:
        _tuning = False


def table() -> dict[str, str]:
    return dict(_table)


def remember(known: Mapping[str, str]) -> None:
    """Adds an earlier process's choices to the table."""
    _table.update(known)


def fastest(problem: str, ways: Callable[[], Mapping[str, Way]], device: torch.device) -> str | None:
    """The way to take; None where the table has none and nothing is tuned.

    Args:
        problem: names everything that the choice depends on, versions too.
        ways: gives the ways by their names, which begin with a library's; the one that surely runs first. Asked for
            only to be timed.
    """
    if problem not in _table and _tuning:
        _table[problem] = _timed(ways(), str(device))
    return _table.get(problem)


def _timed(ways: Mapping[str, Way], device: str) -> str:
    """The name of the fastest way."""
    if len(ways) == 1:
        return next(iter(ways))
    with aside():
        able = {name: way for number, (name, way) in enumerate(ways.items()) if _runs(name, way, sure=not number)}
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()  # one result's memory for all
        replays = {name: _recorded(way, pool) for name, way in able.items()}
        once = {name: stopwatch.seconds(replay, 1, device) for name, replay in replays.items()}
        best = sorted(once, key=once.__getitem__)[:_FINALISTS]
        times = stopwatch.interleaved({name: replays[name] for name in best}, device, _TURN_S)
    return min(best, key=lambda name: median(times[name]))


def _runs(name: str, way: Way, sure: bool) -> bool:
    try:
        way()
    except FAULTS:
        raise
    except Exception as error:
        if sure:
            raise
        _left_out(name.partition(" ")[0], str(error).strip().partition("\n")[0])
        return False
    return True


@cache
def _left_out(library: str, reason: str) -> None:
    # Mostly a release of an optional package that does not go with this torch or GPU.
    message = f"{library} cannot do here what it is there for, and is left out: {reason}"
    warnings.warn(message, Remark, stacklevel=2)


def _recorded(way: Way, pool: Pool) -> Way:
    """A replay of `_CALLS` calls, as a step makes them: launching takes some longer than others."""

    def calls() -> None:
        for _ in range(_CALLS):
            way()

    replay: Way = record(calls, pool).replay
    return replay
