"""Which processes a job runs in, as the options, this machine and its environment have it."""

from typing import Any

import pytest

from fluxcli.core.errors import DeviceError, FluxcliError, UsageError
from fluxcli.engine.runtime import device
from fluxcli.worker import OnThisMachine, Processes, processes


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of eight GPUs."""
    monkeypatch.setattr(device, "gpu_count", lambda: 8)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def visible(chosen: Processes | None) -> list[str]:
    assert isinstance(chosen, OnThisMachine)
    return [environment["CUDA_VISIBLE_DEVICES"] for environment in chosen.environments]


def test_without_either_there_is_this_process_alone() -> None:
    assert processes(None, None, None, "auto") is None


@pytest.mark.parametrize(
    ("gpus", "named"), [("all", [*range(8)]), (2, [0, 1]), ([5, 0, 2], [5, 0, 2]), ([3], [3]), (8, [*range(8)])]
)
def test_each_worker_sees_its_own_gpu_alone(gpus: Any, named: list[int], eight: None) -> None:
    chosen = processes(gpus, None, None, "auto")
    assert chosen is not None and visible(chosen) == [*map(str, named)]
    assert chosen.device == f"cuda:{named[0]}"
    assert chosen.names[0] == f"worker 0 (GPU {named[0]})"


def test_gpus_are_counted_among_those_that_this_process_sees(eight: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-8f1c ,6")
    assert visible(processes("all", None, None, "cuda")) == ["4", "GPU-8f1c", "6"]
    assert visible(processes([2, 1], None, None, "cuda")) == ["6", "GPU-8f1c"]


def test_workers_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for workers, threads in ((3, "2"), (16, "1")):
        chosen = processes(None, workers, None, "cpu")
        assert isinstance(chosen, OnThisMachine) and [*chosen.environments] == [{"OMP_NUM_THREADS": threads}] * workers
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    chosen = processes(None, 2, None, "cpu")
    assert isinstance(chosen, OnThisMachine) and [*chosen.environments] == [{}, {}]


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ((9, None, None, "auto"), DeviceError, "--gpus 9: there are 8 GPUs here"),
        (([0, 8], None, None, "auto"), DeviceError, "there is no GPU 8; there are 8 here, counted from 0"),
        ((2, 2, None, "auto"), UsageError, "--gpus and --workers"),
        ((2, None, None, "cpu"), UsageError, "leave out --device cpu"),
        ((2, None, None, "cuda:1"), UsageError, "leave out --device cuda:1"),
        ((None, 2, None, "auto"), UsageError, "--workers is for a CPU"),
        ((None, 2, None, "cuda"), UsageError, "--workers is for a CPU"),
        ((2, None, "auto", "auto"), UsageError, "--gpus and --ray: one or the other"),
        ((None, 2, "auto", "cuda:1"), UsageError, "leave out --device cuda:1"),
        ((None, None, "auto", "cpu"), UsageError, "--ray on CPUs needs --workers N"),
    ],
)
def test_what_cannot_be_meant_is_told(asked: Any, kind: type[FluxcliError], words: str, eight: None) -> None:
    with pytest.raises(kind, match=words):
        processes(*asked)


def test_gpus_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_count", lambda: 0)
    with pytest.raises(DeviceError, match="there is no CUDA GPU here; on a CPU --workers N starts N processes"):
        processes("all", None, None, "auto")
