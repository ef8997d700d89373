"""Shapes made ready by several processes, each by one: what they compile and measure is in the cache for all."""

from collections import deque
from collections.abc import Callable, Sequence

from fluxcli.core.errors import DeviceError, OutOfMemory
from fluxcli.core.records import Batch, ShapeKey, WarmUp
from fluxcli.job.fleet.fleet import Fleet, Workers
from fluxcli.job.run.lanes import Failed

_DEATHS = 2  # of workers at one shape


def warm_up(
    workers: Workers, keys: Sequence[ShapeKey], report: Callable[[WarmUp], None], say: Callable[[str], None]
) -> list[WarmUp]:
    """Makes every shape ready, in about the order given.

    Raises:
        OutOfMemory: a shape does not fit.
        DeviceError: a shape is the end of its workers.
    """
    ready: list[WarmUp] = []
    waiting, deaths = deque(keys), dict.fromkeys(keys, 0)

    def told(one: WarmUp) -> None:
        ready.append(one)
        report(one)

    with Fleet(workers.first(len(keys)), keys, None, say, told) as fleet:
        index = 0
        while waiting or fleet.busy:
            for lane in fleet.free():
                if waiting and lane.idle:
                    lane.submit(Batch(index, waiting.popleft(), 1, []), alone=True)
                    index += 1
            for each in fleet.wait():
                if not isinstance(each, Failed):
                    continue
                key = each.batch.key
                deaths[key] += 1
                if each.kind == "out_of_memory":
                    raise OutOfMemory(each.message)
                if deaths[key] == _DEATHS:
                    raise DeviceError(f"{key}: {each.message}")
                waiting.append(key)
    return ready
