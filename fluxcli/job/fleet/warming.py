"""Shapes made ready by several processes, each by one on every machine: what they compile and measure is in the cache
for all."""

from collections import deque
from collections.abc import Callable, Sequence

from fluxcli.core.errors import DeviceError, OutOfMemory
from fluxcli.core.records import Batch, ShapeKey, WarmUp
from fluxcli.job.fleet.fleet import Fleet
from fluxcli.job.fleet.process import Workers
from fluxcli.job.run.lanes import Failed

_DEATHS = 2  # of workers at one shape


def warm_up(
    workers: Workers, keys: Sequence[ShapeKey], report: Callable[[WarmUp], None], say: Callable[[str], None]
) -> list[WarmUp]:
    """Makes every shape ready on every machine that there are workers on, in about the order given. Where machines
    share a cache, the later ones read it.

    Raises:
        OutOfMemory: a shape does not fit.
        DeviceError: a shape is the end of its workers.
    """
    ready: list[WarmUp] = []
    deaths = dict.fromkeys(keys, 0)
    waiting: dict[str | None, deque[ShapeKey]] = {}  # by machine

    def told(one: WarmUp) -> None:
        ready.append(one)
        report(one)

    with Fleet(workers if workers.scattered else workers.first(len(keys)), keys, None, say, told) as fleet:
        held: dict[int, str | None] = {}  # which machine's shape a batch is
        while fleet.busy or any(waiting.get(host, True) for host in fleet.hosts()):
            for lane in fleet.free():
                shapes = waiting.setdefault(lane.host, deque(keys))
                if shapes and lane.idle:
                    held[len(held)] = lane.host
                    lane.submit(Batch(len(held) - 1, shapes.popleft(), 1, []), alone=True)
            for each in fleet.wait():
                if not isinstance(each, Failed):
                    continue
                key = each.batch.key
                deaths[key] += 1
                if each.kind == "out_of_memory":
                    raise OutOfMemory(each.message)
                if deaths[key] == _DEATHS:
                    raise DeviceError(f"{key}: {each.message}")
                waiting[held[each.batch.index]].append(key)
    return ready
