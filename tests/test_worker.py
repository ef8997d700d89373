"""Which processes a job runs in, as the options, this machine and its environment have it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fluxcli import worker
from fluxcli.core.errors import DeviceError, FluxcliError, ModelError, UsageError
from fluxcli.engine.runtime import device
from fluxcli.models.checkpoints import resolve
from fluxcli.worker import OnCluster, OnThisMachine, Processes, processes


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


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is joined: of no GPU and four CPUs, unless a test says more."""

    class Joined:
        gpus, cpus, closed = 0, 4, 0

        def __init__(self, address: str, cpus: int | None) -> None:
            self.asked = cpus

        def close(self) -> None:
            Joined.closed += 1

    monkeypatch.setattr(worker, "Cluster", Joined)
    return Joined


def test_on_a_cluster_there_is_a_worker_for_each_gpu_or_as_many_as_are_asked_for(cluster: Any) -> None:
    cluster.gpus = 3
    for workers, asked, kind, count in ((None, "auto", "cuda", 3), (2, "cuda", "cuda", 2), (4, "cpu", "cpu", 4)):
        chosen = processes(None, workers, "auto", asked)
        assert isinstance(chosen, OnCluster) and chosen.elsewhere
        assert (chosen.device, len(chosen.names)) == (kind, count)
        assert chosen.cluster.asked == (workers if kind == "cpu" else None)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("gpus", "workers", "device", "words"),
    [
        (0, None, "auto", "--ray auto: the cluster has no GPUs; --device cpu --workers N runs on its CPUs"),
        (0, 2, "cuda", "the cluster has no GPUs"),
        (2, 3, "auto", "--workers 3: the cluster at auto has 2 GPUs now, one for each"),
        (2, 5, "cpu", "--workers 5: the cluster at auto has 4 CPUs now"),
    ],
)
def test_what_a_cluster_has_no_room_for(gpus: int, workers: int | None, device: str, words: str, cluster: Any) -> None:
    cluster.gpus = gpus
    with pytest.raises(DeviceError, match=words):
        processes(None, workers, "auto", device)
    assert cluster.closed == 1


def test_what_is_elsewhere_is_not_looked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    settled = device.resolve("cuda", "auto", None, "fa4", "fp8", elsewhere=True)
    assert (settled.device, settled.dtype, settled.compile) == ("cuda", "bfloat16", True)
    assert device.machine(settled)["device"] == "cuda"
    with pytest.raises(DeviceError, match="sees no CUDA GPU"):
        device.check(replace(settled, device="cuda:0"))


def test_another_machines_model_must_be_the_same() -> None:
    tiny = resolve("tiny")
    chosen = OnCluster(cast(Any, SimpleNamespace(cpus=1)), "cuda", ["worker 0"])
    settings = chosen.workers(tiny, device.resolve("cuda", "auto", None, "auto", elsewhere=True)).settings
    assert settings["engine"]["device"] == "cuda:0"
    about = settings["checkpoint"]
    assert about["name"] == "tiny" and worker._checkpoint(about) == tiny
    with pytest.raises(ModelError, match=r"--model tiny: .*tiny on \S+ is another model"):
        worker._checkpoint({**about, "fingerprint": "2:0"})
