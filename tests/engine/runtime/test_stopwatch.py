"""Contestants take turns, and time is told apart."""

import time

import pytest

from fluxcli.engine.runtime import stopwatch


def test_every_round_has_every_contestant_and_none_always_follows_the_same_one() -> None:
    order: list[str] = []
    times = stopwatch.interleaved({name: (lambda name=name: order.append(name)) for name in "abc"}, "cpu", 0)
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abc", stopwatch.ROUNDS)
    assert "".join(order[:6]) == "aabbcc"  # to settle, and to learn how long a call takes
    assert ["".join(order[i : i + 3]) for i in range(6, len(order), 3)] == ["abc", "bca", "cab", "abc", "bca"]


def test_a_slow_call_takes_longer_and_a_fast_one_is_called_more_often() -> None:
    calls = {"slow": 0, "fast": 0}

    def wait(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    times = stopwatch.interleaved(
        {"slow": lambda: wait("slow", 0.02), "fast": lambda: wait("fast", 0.002)}, "cpu", 0.02
    )
    assert calls["fast"] > calls["slow"] == 2 + stopwatch.ROUNDS
    assert stopwatch.milliseconds(times["slow"]) >= 20
    assert 2 <= stopwatch.milliseconds(times["fast"]) < stopwatch.milliseconds(times["slow"])


def test_a_figure_is_the_median_round() -> None:
    assert stopwatch.milliseconds([0.002, 0.001, 9.0]) == pytest.approx(2)
