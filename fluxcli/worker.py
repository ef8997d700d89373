"""Which processes a job runs in, here or on a cluster, and `python -m fluxcli.worker`: one of them, started by that job
alone."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import DeviceError, ModelError, UsageError
from fluxcli.core.records import ShapeKey
from fluxcli.job.fleet.cluster.cluster import Cluster
from fluxcli.job.fleet.process import Workers, local
from fluxcli.job.fleet.serve import serve
from fluxcli.job.run.lanes import ENCODERS
from fluxcli.models import checkpoints
from fluxcli.models.checkpoints import Checkpoint

_MODULE = "fluxcli.worker"  # what runs in each


class Processes(Protocol):
    """Several. `device` is the first one's, as this process calls it; where they are `elsewhere`, it may have none."""

    @property
    def device(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def elsewhere(self) -> bool: ...

    def workers(self, checkpoint: Checkpoint, config: EngineConfig) -> Workers:
        """What a job runs in, settled for `device`: each sees its own GPU alone."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class OnThisMachine:
    """One of `names` and `environments` for each."""

    device: str
    names: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    elsewhere: bool = False

    def workers(self, checkpoint: Checkpoint, config: EngineConfig) -> Workers:
        about = {"name": checkpoint.name, "directory": str(checkpoint.directory.absolute())}
        model = {**about, "revision": checkpoint.revision, "random": checkpoint.random, "files": _files(checkpoint)}
        return Workers(_settings(model, config), self.names, local(_MODULE, self.environments))

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class OnCluster:
    """Actors, each with a GPU, or on a CPU."""

    cluster: Cluster
    device: str
    names: Sequence[str]
    elsewhere: bool = True

    def workers(self, checkpoint: Checkpoint, config: EngineConfig) -> Workers:
        # Each machine finds the model for itself, by the same name, and it must be the same.
        named = checkpoint.revision or checkpoint.directory.is_relative_to(checkpoints.BUILT_IN)
        name = checkpoint.name if named else str(checkpoint.directory.absolute())
        if (file := Path(name).expanduser()).is_file():
            name = str(file.absolute())
        about = {"name": name, "revision": checkpoint.revision, "files": _files(checkpoint)}
        model = {**about, "fingerprint": checkpoint.fingerprint()}
        gpu = self.device != "cpu"

        def spawn(number: int, before: int) -> Any:
            return self.cluster.spawn(_MODULE, self.names[number], before + 1, gpu)

        encoders = max(1, min(ENCODERS, self.cluster.cpus // len(self.names)))
        return Workers(_settings(model, config), self.names, spawn, encoders=encoders, scattered=True)

    def close(self) -> None:
        self.cluster.close()


def _files(checkpoint: Checkpoint) -> dict[str, str]:
    return {part: str(file.absolute()) for part, file in checkpoint.files.items()}


def _settings(model: dict[str, Any], config: EngineConfig) -> dict[str, Any]:
    device = "cuda:0" if config.device.startswith("cuda") else config.device
    return {"checkpoint": model, "engine": {**asdict(config), "device": device}}


def processes(
    gpus: str | int | Sequence[int] | None, workers: int | None, ray: str | None, device: str
) -> Processes | None:
    """What --gpus ("all", a number, or GPUs by index), --workers, --ray and --device ask for; None for this process
    alone. To be closed.

    Raises:
        UsageError: what cannot be meant together, or at all.
        DeviceError: GPUs that are not there.
        FluxcliError: a cluster that is not there.
    """
    if ray is not None:
        if gpus is not None:
            raise UsageError("--gpus and --ray: one or the other; --gpus is for this machine, --ray takes --workers")
        return _on_cluster(ray, workers, device)
    if gpus is None and workers is None:
        return None
    if gpus is not None and workers is not None:
        raise UsageError("--gpus and --workers: one or the other; a GPU has one worker, and --workers is for a CPU")
    if gpus is not None:
        return _on_gpus(gpus, device)
    assert workers is not None
    return _on_cpu(workers, device)


def _on_cluster(address: str, workers: int | None, device: str) -> Processes:
    if device not in ("auto", "cuda", "cpu"):
        raise UsageError(f"--ray gives each worker a GPU; leave out --device {device}")
    if device == "cpu" and workers is None:
        raise UsageError("--ray on CPUs needs --workers N")
    cluster = Cluster(address, workers if device == "cpu" else None)
    try:
        there, kind = (cluster.cpus, "CPUs") if device == "cpu" else (cluster.gpus, "GPUs")
        if not there:
            hint = "" if device == "cpu" else "; --device cpu --workers N runs on its CPUs"
            raise DeviceError(f"--ray {address}: the cluster has no {kind}{hint}")
        if workers is not None and workers > there:
            raise DeviceError(f"--workers {workers}: the cluster at {address} has {there} {kind} now, one for each")
    except BaseException:
        cluster.close()
        raise
    names = [f"worker {number}" for number in range(workers or there)]
    return OnCluster(cluster, "cpu" if device == "cpu" else "cuda", names)


def _on_gpus(gpus: str | int | Sequence[int], device: str) -> Processes:
    from fluxcli.engine.runtime.device import alone, gpu_count

    if device not in ("auto", "cuda"):
        raise UsageError(f"--gpus says which GPUs; leave out --device {device}")
    there = gpu_count()
    if not there:
        raise DeviceError("--gpus: there is no CUDA GPU here; on a CPU --workers N starts N processes")
    if isinstance(gpus, str):
        gpus = there
    if isinstance(gpus, int):
        if gpus > there:
            raise DeviceError(f"--gpus {gpus}: there are {there} GPUs here")
        gpus = range(gpus)
    for index in gpus:
        if index >= there:
            raise DeviceError(f"--gpus: there is no GPU {index}; there are {there} here, counted from 0")
    names = [f"worker {number} (GPU {index})" for number, index in enumerate(gpus)]
    return OnThisMachine(f"cuda:{gpus[0]}", names, [alone(index) for index in gpus])


def _on_cpu(workers: int, device: str) -> Processes:
    from fluxcli.engine.runtime.device import has_gpu

    if device.startswith("cuda") or (device == "auto" and has_gpu()):
        raise UsageError("--workers is for a CPU: GPUs are for --gpus, or say --device cpu")
    threads = max(1, (os.cpu_count() or 1) // workers)
    own = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    return OnThisMachine("cpu", [f"worker {number}" for number in range(workers)], [own] * workers)


def engine(settings: dict[str, Any], shapes: list[ShapeKey], say: Callable[[str], None]) -> tuple[Any, str]:
    """A worker's engine, and what its device is called."""
    from fluxcli.engine.engine import Engine
    from fluxcli.engine.runtime import device

    start = time.perf_counter()
    checkpoint = _checkpoint(settings["checkpoint"])
    config = EngineConfig(**settings["engine"])
    device.check(config)
    engine = Engine(checkpoint, config, shapes)
    say(f"{checkpoint.name} ({config.dtype}) loaded in {time.perf_counter() - start:.1f} s")
    if engine.memory.visiting_text:
        say("T5 stays on the host and visits the GPU block by block: memory is short")
    return engine, str(device.machine(config)["device"])


def _checkpoint(about: dict[str, Any]) -> Checkpoint:
    """As the job has it on this machine; on another, the one that the same name means there, if it is the same."""
    if "fingerprint" not in about:
        files = {part: Path(file) for part, file in about["files"].items()}
        return Checkpoint(**{**about, "directory": Path(about["directory"]), "files": files})
    checkpoint = checkpoints.resolve(about["name"], about["revision"], about["files"])
    if checkpoint.fingerprint() != about["fingerprint"]:
        raise ModelError(f"--model {about['name']}: {checkpoint.directory} on {os.uname().nodename} is another model")
    return checkpoint


if __name__ == "__main__":
    serve(engine)
