"""What the options mean on this machine: the model, the engine and its settings, every "auto" and default settled."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from fluxcli.core import config
from fluxcli.core.errors import UsageError
from fluxcli.core.terminal import printable
from fluxcli.job.run import signals

if TYPE_CHECKING:
    from fluxcli.core.records import ShapeKey
    from fluxcli.job.plan import BatchSize
    from fluxcli.models.checkpoints import Checkpoint


def say(text: str) -> None:
    """Everything for people goes to stderr, as a terminal can safely show it; stdout carries results."""
    text = printable(text)
    try:
        click.echo(text, err=True)
    except RuntimeError:  # a signal came amid a message, and this is about the signal
        signals.tell(text)


def checkpoint_of(name: str | None, revision: str | None) -> "Checkpoint":
    from fluxcli.models import checkpoints

    if name is None:
        from fluxcli.engine.runtime import device

        if device.has_gpu():
            name = checkpoints.HUB_DEFAULT
            say(f"no --model given: using {name}")
        else:
            name = "tiny"
            say("no --model given and no CUDA GPU here: using the built-in tiny model")
    return checkpoints.resolve(name, revision)


def load_engine(checkpoint: "Checkpoint", engine_config: config.EngineConfig, shapes: "Sequence[ShapeKey]") -> Any:
    from fluxcli.engine.engine import Engine

    say(f"loading {checkpoint.name} ({engine_config.dtype}) on {engine_config.device}")
    engine = Engine(checkpoint, engine_config, shapes)
    if engine.memory.visiting_text:
        say("T5 stays on the host and visits the GPU block by block: memory is short")
    return engine


def batch_sizes(given: int | str, checkpoint: "Checkpoint", engine_config: config.EngineConfig) -> "BatchSize":
    """--batch-size as the planner takes it."""
    if isinstance(given, int):
        return given
    from fluxcli.engine.memory import LargestBatch

    return LargestBatch(checkpoint, engine_config)


def settings(options: dict[str, Any]) -> tuple["Checkpoint", config.EngineConfig, config.RowDefaults]:
    """What the shared options mean here, every "auto" and default settled."""
    checkpoint = checkpoint_of(options["model"], options["revision"])
    if options["guidance"] is not None and not checkpoint.takes_guidance:
        remark = f"--guidance changes nothing: {checkpoint.name} takes no guidance scale"
        if options.get("strict"):
            raise UsageError(f"{remark} (--strict)")
        say(remark)
    return checkpoint, engine_settings(options), _row_defaults(checkpoint, options)


def engine_settings(options: dict[str, Any]) -> config.EngineConfig:
    """Raises DeviceError for what is not there: before anything is read or loaded."""
    from fluxcli.engine.attention import backends
    from fluxcli.engine.runtime import device

    settled = device.resolve(options["device"], options["dtype"], options["compile"], options["attention"])
    backends.check(settled.attention, settled.device, device.DTYPES[settled.dtype])
    return settled


def _row_defaults(checkpoint: "Checkpoint", options: dict[str, Any]) -> config.RowDefaults:
    own = checkpoint.row_defaults()
    given = {
        "width": options["width"],
        "height": options["height"],
        "num_inference_steps": options["steps"],
        "guidance_scale": options["guidance"] if checkpoint.takes_guidance else None,
        "seed": options["seed"],
    }
    return replace(own, **{name: value for name, value in given.items() if value is not None})
