"""Which processes a job runs in, and `python -m fluxcli.worker`: one of them, started by that job alone."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import DeviceError, UsageError
from fluxcli.core.records import ShapeKey
from fluxcli.job.fleet.fleet import Workers
from fluxcli.job.fleet.serve import serve
from fluxcli.models.checkpoints import Checkpoint


@dataclass(frozen=True)
class Processes:
    """One of `names` and `environments` for each. `device` is the first one's, as this process calls it."""

    device: str
    names: Sequence[str]
    environments: Sequence[Mapping[str, str]]

    def workers(self, checkpoint: Checkpoint, config: EngineConfig) -> Workers:
        """What a job runs in, settled for `device`: each process sees its own GPU alone."""
        about = {"name": checkpoint.name, "directory": str(checkpoint.directory.absolute())}
        files = {part: str(file.absolute()) for part, file in checkpoint.files.items()}
        device = "cuda:0" if config.device.startswith("cuda") else config.device
        settings = {
            "checkpoint": {**about, "revision": checkpoint.revision, "random": checkpoint.random, "files": files},
            "engine": {**asdict(config), "device": device},
        }
        return Workers("fluxcli.worker", settings, self.names, self.environments)


def processes(gpus: str | int | Sequence[int] | None, workers: int | None, device: str) -> Processes | None:
    """What --gpus ("all", a number, or GPUs by index), --workers and --device ask for; None for this process alone.

    Raises:
        UsageError: what cannot be meant together, or at all.
        DeviceError: GPUs that are not there.
    """
    if gpus is None and workers is None:
        return None
    if gpus is not None and workers is not None:
        raise UsageError("--gpus and --workers: one or the other; a GPU has one worker, and --workers is for a CPU")
    if gpus is not None:
        return _on_gpus(gpus, device)
    assert workers is not None
    return _on_cpu(workers, device)


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
    return Processes(f"cuda:{gpus[0]}", names, [alone(index) for index in gpus])


def _on_cpu(workers: int, device: str) -> Processes:
    from fluxcli.engine.runtime.device import has_gpu

    if device.startswith("cuda") or (device == "auto" and has_gpu()):
        raise UsageError("--workers is for a CPU: GPUs are for --gpus, or say --device cpu")
    threads = max(1, (os.cpu_count() or 1) // workers)
    own = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    return Processes("cpu", [f"worker {number}" for number in range(workers)], [own] * workers)


def _engine(settings: dict[str, Any], shapes: list[ShapeKey], say: Callable[[str], None]) -> tuple[Any, str]:
    from fluxcli.engine.engine import Engine
    from fluxcli.engine.runtime import device

    start = time.perf_counter()
    about = settings["checkpoint"]
    files = {part: Path(file) for part, file in about["files"].items()}
    checkpoint = Checkpoint(**{**about, "directory": Path(about["directory"]), "files": files})
    config = EngineConfig(**settings["engine"])
    engine = Engine(checkpoint, config, shapes)
    say(f"{checkpoint.name} ({config.dtype}) loaded in {time.perf_counter() - start:.1f} s")
    if engine.memory.visiting_text:
        say("T5 stays on the host and visits the GPU block by block: memory is short")
    return engine, str(device.machine(config)["device"])


if __name__ == "__main__":
    serve(_engine)
