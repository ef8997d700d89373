"""What a running job says of itself off a terminal."""

import re
import time

import pytest

from fluxcli.job.run import progress as module
from fluxcli.job.run.progress import Progress, Reading, told_if_slow


def test_rows_that_could_not_be_read_take_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = Progress(100, clock=lambda: now)
    progress.advance(0, failed=3000)  # of the input, before the first of the 100 is begun
    progress.start()
    now = 60.0
    progress.advance(30, failed=10)
    line = capsys.readouterr().err
    assert "30/100 images, 0.50 images/s, 0:02:00 left, 3010 failed" in line
    assert not re.search("-[0-9]", line)


def test_workers_are_told_of_beside_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = Progress(100, clock=lambda: now)
    progress.pulse = lambda: "2 workers, 0.40 to 0.60 images/s each, 1 replaced"
    progress.start()
    now = 60.0
    progress.advance(60)
    assert capsys.readouterr().err.endswith("0 failed, 2 workers, 0.40 to 0.60 images/s each, 1 replaced\n")


def test_a_long_reading_tells_how_far_it_is_and_a_short_one_nothing() -> None:
    now, said = 0.0, []
    reading = Reading(said.append, clock=lambda: now)
    for row in range(1000):
        now = row / 10  # seconds: 100 of them
        reading()
    assert said == [f"reading rows: {rows} so far" for rows in (21, 321, 621, 921)]
    said.clear()
    short = Reading(said.append, clock=lambda: 1000.0)
    for _ in range(1000):
        short()
    assert said == []


def test_what_takes_long_is_told_once_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.02)
    said: list[str] = []
    with told_if_slow(said.append, "reading"):
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.005)
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    with told_if_slow(said.append, "nothing"):
        pass
    time.sleep(0.4)
    assert said == ["reading"]
