"""`python -m fluxcli.worker`: one process of a job with several, started by that job alone."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxcli.core.config import EngineConfig
from fluxcli.core.records import ShapeKey
from fluxcli.job.fleet.serve import serve
from fluxcli.models.checkpoints import Checkpoint


def settings(checkpoint: Checkpoint, config: EngineConfig) -> dict[str, Any]:
    """What `engine` makes an engine of, as plain values: the job has found the model, and looked at it."""
    about = {"name": checkpoint.name, "directory": str(checkpoint.directory.absolute())}
    return {
        "checkpoint": {**about, "revision": checkpoint.revision, "random": checkpoint.random},
        "engine": [config.device, config.dtype, config.compile, config.attention],
    }


def engine(settings: dict[str, Any], shapes: list[ShapeKey], say: Callable[[str], None]) -> tuple[Any, str]:
    from fluxcli.engine.engine import Engine
    from fluxcli.engine.runtime import device

    start = time.perf_counter()
    about = settings["checkpoint"]
    checkpoint = Checkpoint(**{**about, "directory": Path(about["directory"])})
    config = EngineConfig(*settings["engine"])
    made = Engine(checkpoint, config, shapes)
    say(f"loaded in {time.perf_counter() - start:.1f} s")
    if made.memory.visiting_text:
        say("T5 stays on the host and visits the GPU block by block: memory is short")
    return made, str(device.machine(config)["device"])


if __name__ == "__main__":
    serve(engine)
