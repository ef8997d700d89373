"""Shapes made ready by several processes: each once, by one of them."""

from pathlib import Path

import pytest

from fluxcli.core.errors import DeviceError
from fluxcli.core.records import ShapeKey
from fluxcli.job.fleet.warming import warm_up
from tests.job.fleet import fleets

KEYS = [ShapeKey(4, side, 64, 64) for side in range(64, 128, 16)]


def test_each_shape_is_made_ready_once(tmp_path: Path) -> None:
    log, pids, told = tmp_path / "log", tmp_path / "pids", []
    workers = fleets.fleet(2, log=str(log), pids=str(pids))
    ready = warm_up(workers, KEYS, told.append, lambda text: None)
    assert {one.key for one in ready} == {*KEYS} and ready == told
    assert sorted(line.split(" ", 1)[1] for line in log.read_text().splitlines()) == sorted(map(str, KEYS))
    assert fleets.gone(pids, 0.0)


def test_a_shape_that_kills_its_workers_is_named(tmp_path: Path) -> None:
    workers = fleets.fleet(2, deadly=str(KEYS[1]))
    with pytest.raises(DeviceError, match=r"4 x 64x80, text 64: .*killed by SIGKILL"):
        warm_up(workers, KEYS, lambda one: None, lambda text: None)
