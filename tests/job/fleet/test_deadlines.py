"""How long is waited: never less than the least, and longer where the work is known to take longer."""

from fluxcli.core.records import ShapeKey
from fluxcli.job.fleet.deadlines import Deadlines, Patience

SMALL, LARGE = ShapeKey(1, 64, 64, 64), ShapeKey(16, 1024, 1024, 512)


def test_deadlines_grow_with_what_was_measured() -> None:
    deadlines = Deadlines(Patience(start=100.0, warm_up=50.0, batch=10.0, times=10.0))
    assert (deadlines.start(), deadlines.warm_up(LARGE), deadlines.batch(LARGE, 28)) == (100.0, 50.0, 50.0)
    deadlines.started(30.0)
    deadlines.warmed(LARGE, 20.0)
    deadlines.made(LARGE, 28, 56.0)
    deadlines.made(LARGE, 28, 28.0)
    deadlines.made(SMALL, 28, 0.1)
    assert deadlines.start() == 300.0
    assert (deadlines.warm_up(LARGE), deadlines.warm_up(SMALL)) == (200.0, 50.0)
    assert (deadlines.batch(LARGE, 28), deadlines.batch(LARGE, 14), deadlines.batch(SMALL, 28)) == (560.0, 280.0, 10.0)
