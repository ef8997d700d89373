"""What a running job says of itself off a terminal."""

import re

import pytest

from fluxcli.job.run.progress import Progress


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
