"""The tuner: what is timed, what is kept, and what becomes of a way that fails."""

import warnings
from contextlib import nullcontext

import pytest
import torch

from fluxcli.core.errors import Remark
from fluxcli.engine.runtime import stopwatch, tuner
from fluxcli.engine.runtime.tuner import Tuner


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts what each way is said to take."""
    monkeypatch.setattr(tuner, "_recorded", lambda way, pool: way)
    monkeypatch.setattr(tuner, "aside", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(stopwatch, "seconds", lambda run, calls, device: run())
    monkeypatch.setattr(
        stopwatch, "interleaved", lambda runs, device, turn, rounds: {each: [run()] for each, run in runs.items()}
    )


def ways(**seconds: float):
    return {each: lambda taken=taken: taken for each, taken in seconds.items()}


def broken() -> float:
    raise TypeError("epilogue fn depends on …\nat some place")


def test_the_first_way_runs_while_nothing_is_known() -> None:
    made = Tuner("cpu")
    assert made.run("a matmul", ways(one=3, other=2)) == 3
    assert made.table == {}


def test_the_fastest_is_taken_and_stays() -> None:
    made = Tuner("cpu")
    with made.tuning():
        assert made.run("a matmul", ways(one=3, other=2, third=5)) == 2
        assert made.run("a matmul", ways(one=1, other=2)) == 2
    assert made.run("a matmul", ways(one=1, other=2)) == 2
    assert made.table == {"a matmul": "other"}


def test_two_tuners_do_not_see_each_others_choices() -> None:
    made, other = Tuner("cpu"), Tuner("cpu")
    with made.tuning():
        made.run("a matmul", ways(one=3, other=2))
        assert other.run("a matmul", ways(one=3, other=2)) == 3
    assert other.table == {}


def test_what_an_earlier_process_chose_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Tuner("cpu", {"a matmul": "other"})
    monkeypatch.setattr(made, "_timed", lambda *args: pytest.fail("timed again"))
    with made.tuning():
        assert made.run("a matmul", ways(one=1, other=2)) == 2


def test_what_is_no_choice_in_a_file_is_none() -> None:
    assert Tuner("cpu", {"a matmul": ["other"], "another": "one"}).table == {"another": "one"}


def test_a_choice_that_is_no_longer_there_is_made_anew() -> None:
    made = Tuner("cpu", {"a matmul": "gone"})
    assert made.run("a matmul", ways(one=3, other=2)) == 3
    with made.tuning():
        assert made.run("a matmul", ways(one=3, other=2)) == 2


def test_a_way_that_leaves_a_trace_is_rehearsed_elsewhere() -> None:
    made, traces = Tuner("cpu"), []
    way = {"one": lambda: traces.append("real") or 1, "other": lambda: traces.append("real") or 2}
    with made.tuning():
        made.run("adding", way, lambda: ways(one=3, other=2))
    assert traces == ["real"]


@pytest.mark.parametrize("rest", [{}, {"quack 2": broken}])
def test_a_way_that_fails_while_it_is_timed_is_left_out_and_told_once(rest) -> None:
    made = Tuner("cpu")
    with made.tuning(), pytest.warns(Remark, match="quack .* is left out: epilogue fn depends on …$") as said:
        assert made.run("a matmul", {"torch": lambda: 2.0, "quack 1": broken, **rest}) == 2
        assert made.run("another", {"torch": lambda: 2.0, "quack 1": broken}) == 2
    assert len(said) == 1


def test_a_way_that_fails_later_is_told_and_the_sure_one_runs() -> None:
    made = Tuner("cpu", {"a matmul": "quack 1"})
    with pytest.warns(Remark, match="quack .* is left out"):
        assert made.run("a matmul", {"torch": lambda: 2.0, "quack 1": broken}) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.run("a matmul", {"torch": lambda: 2.0, "quack 1": broken}) == 2


def test_the_first_way_must_run() -> None:
    made = Tuner("cpu")
    with pytest.raises(TypeError), made.tuning():
        made.run("a matmul", {"torch": broken, "quack": lambda: 1.0})
    assert not made.table


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError("out of memory"), torch.AcceleratorError("lost")], ids=type)
@pytest.mark.parametrize("tuning", [True, False])
def test_the_devices_own_faults_are_held_against_no_way(fault: Exception, tuning: bool) -> None:
    def out() -> float:
        raise fault

    made = Tuner("cpu", {} if tuning else {"a matmul": "quack 1"})
    with pytest.raises(type(fault)), made.tuning() if tuning else nullcontext():
        made.run("a matmul", {"torch": lambda: 2.0, "quack 1": out})
    assert made.table == ({} if tuning else {"a matmul": "quack 1"})


def test_what_another_process_settled_meanwhile_is_taken_and_what_is_found_is_told() -> None:
    settled = {"a matmul": "one", "a stranger": "gone"}

    def settle(problem: str, taken, timed) -> str:
        if not taken(settled.get(problem)):
            settled[problem] = timed()
        return settled[problem]

    made = Tuner("cpu", {}, settle)
    assert made.run("a matmul", ways(one=3, other=2)) == 3  # nothing is settled while nothing is tuned
    with made.tuning():
        assert made.run("a matmul", ways(one=3, other=2)) == 3
        assert made.run("a stranger", ways(one=3, other=2)) == 2
    assert settled == made.table == {"a matmul": "one", "a stranger": "other"}
