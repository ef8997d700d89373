"""What a running job says of itself off a terminal."""

import io
import re
import sys
import textwrap
import time

import pytest

from fluxcli.core.records import Group
from fluxcli.core.step_cache import REUSED, StepCache
from fluxcli.job.plan import work
from fluxcli.job.run import progress as module
from fluxcli.job.run.progress import Progress, Reading, told_if_slow
from tests import terminal
from tests.core.test_step_cache import DEV


def test_rows_that_could_not_be_read_take_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = Progress(100, clock=lambda: now)
    progress.advance(0, failed=3000)  # of the input, before the first of the 100 is begun
    progress.start()
    now = 60.0
    progress.advance(30, failed=10)  # these took their time
    line = capsys.readouterr().err
    assert "30/100 images, 0.50 images/s, 0:01:30 left, 3010 failed" in line
    assert not re.search("-[0-9]", line)


def test_the_time_left_is_right_to_a_twentieth_where_rows_are_unlike(capsys: pytest.CaptureFixture[str]) -> None:
    """Large images first, then many steps, then few, under a mask: what is left is told by its work, not by images."""
    cache = StepCache("balanced", DEV)
    groups = [Group(side, side, 64, steps) for side, steps in ((1024, 28), (1024, 12), (512, 50), (512, 10))]
    images = [group for group in groups for _ in range(40)]
    now, ends = 0.0, sum(map(seconds, images))
    progress = Progress(len(images), sum(work(group, cache) for group in images), clock=lambda: now)
    progress.start()
    for number, group in enumerate(images[:-1]):
        now += seconds(group)
        progress.advance(1, work=work(group, cache))
        if number % 10 == 9:
            progress.say(progress._line())
            line = capsys.readouterr().err.splitlines()[-1]
            hours, minutes, left = map(int, re.search(r"(\d+):(\d+):(\d+) left", line).groups())
            assert 3600 * hours + 60 * minutes + left == pytest.approx(ends - now, rel=0.05, abs=1), line


def seconds(group: Group) -> float:
    """What an image takes at 640 TFLOP/s, where a reused step costs twice what is reckoned with; and its decoding."""
    mask = StepCache("balanced", DEV).mask(group.num_inference_steps)
    pixels, tokens = group.height * group.width, group.height * group.width // 256 + group.text_length
    step = (12.9e9 * tokens + 4 * 3072 * 57 * tokens**2) / 640e12
    return step * (mask.count("1") + 2 * REUSED * mask.count("0")) + 0.027 * pixels / 2**20


def test_the_bar_tells_the_same_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", shown)
    now = 0.0
    with Progress(100, 1000.0, clock=lambda: now) as progress:
        progress.start()
        now = 10.0
        progress.advance(10, work=500.0)  # half of all there is to do
        progress._bar.refresh()
    assert "10/100" in shown.getvalue() and "<0:00:10," in shown.getvalue()


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


def test_a_stop_is_told_how_long_the_batch_in_flight_takes() -> None:
    now = 0.0
    progress = Progress(100, 1000.0, clock=lambda: now)
    progress.start()
    assert progress.stopping(1, 80.0, 3.0) == "stopping after the batch in flight; again quits now"  # nothing to go by
    now = 60.0
    progress.advance(10, work=120.0)
    assert progress.stopping(1, 80.0, 10.0) == "stopping after the batch in flight (about 30 s); again quits now"
    assert progress.stopping(4, 80.0, 39.9) == "stopping after the 4 batches in flight (about 1 s); again quits now"
    assert progress.stopping(0, 0.0, 0.0) == "stopping when the last files are saved; again quits now"


@pytest.mark.parametrize("columns", [0, 40, 80, 200])
def test_the_bar_writes_no_blank_line_whatever_the_terminal_says_of_itself(columns: int) -> None:
    """A new pseudo-terminal, as those of CI and of some editors, says that it has 0 columns."""
    text = shown(
        columns,
        """
        import time
        with Progress(8) as progress:
            progress.start()
            for _ in range(4):
                time.sleep(0.11)
                progress.advance(2)
            progress.say("a word")
    """,
    )
    lines = text.replace("\r\n", "\n").split("\n")
    assert lines.pop() == ""
    assert all(line.strip() for line in lines), lines
    assert any("8/8" in line for line in lines)
    width = columns or 80
    assert max(len(part) for line in lines for part in line.split("\r")) <= width


def test_what_is_quiet_shows_no_bar_and_says_nothing() -> None:
    assert (
        shown(
            80,
            """
        with Progress(2, quiet=True) as progress:
            progress.start()
            progress.advance(2)
            progress.say("a word")
            progress.end()
    """,
        )
        == ""
    )


def shown(columns: int, code: str) -> str:
    """What the code writes to a terminal so wide."""
    whole = f"from fluxcli.job.run.progress import Progress\n{textwrap.dedent(code)}"
    return terminal.run([sys.executable, "-c", whole], columns).text
