"""Timing by turns: everything compared runs in every round, so that a clock that drifts drifts for all."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

ROUNDS = 5

Run = Callable[[], object]


def interleaved(runs: Mapping[str, Run], device: str, turn_s: float, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one figure a round.

    Each is called once to settle and once to learn how often it fits into a turn. Every round begins with another
    contestant, so that none always follows the same one.

    Args:
        turn_s: seconds of each contestant in each round, where one call takes less.
    """
    names = list(runs)
    calls = {}
    for name in names:
        runs[name]()
        calls[name] = max(1, int(turn_s / seconds(runs[name], 1, device)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(runs[name], calls[name], device))
    return times


def seconds(run: Run, calls: int, device: str) -> float:
    """Mean of `calls` calls in a row: on the device's own clock where it has one."""
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def milliseconds(times: list[float]) -> float:
    """The median round."""
    return median(times) * 1e3
