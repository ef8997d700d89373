"""What the options mean on this machine: the model, the engine and its settings, every "auto" and default settled."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from fluxcli.cli import streams
from fluxcli.core import config
from fluxcli.core.errors import UsageError
from fluxcli.core.terminal import printable
from fluxcli.job.run import signals

if TYPE_CHECKING:
    from fluxcli.cli.options import Machine, Rows
    from fluxcli.core.records import ShapeKey
    from fluxcli.engine.engine import Engine
    from fluxcli.job.plan import BatchSize
    from fluxcli.models.checkpoints import Checkpoint


def say(text: str) -> None:
    """Everything for people goes to stderr, as a terminal can safely show it; stdout carries results."""
    if not streams.is_quiet():
        complain(text)


def complain(text: str) -> None:
    """As `say`, of errors: whatever -q."""
    text = printable(text)
    try:
        click.echo(text, err=True)
    except RuntimeError:  # a signal came amid a message, and this is about the signal
        signals.tell(text)


def checkpoint_of(machine: "Machine", gpu: bool = False) -> "Checkpoint":
    """The model. A `gpu` may be another machine's."""
    from fluxcli.models import checkpoints

    name = machine.model
    if name is None:
        from fluxcli.engine.runtime import device

        if gpu or device.has_gpu():
            name = checkpoints.HUB_DEFAULT
            say(f"no --model given: using {name}")
        else:
            name = "tiny"
            say(
                "no --model given and no CUDA GPU here: using the built-in tiny model, which draws only plain shapes, "
                'for example "a red circle above a blue square"'
            )
    return checkpoints.resolve(name, machine.revision, machine.files)


def load_engine(checkpoint: "Checkpoint", engine_config: config.EngineConfig, shapes: "Sequence[ShapeKey]") -> "Engine":
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
    if engine_config.device == "cuda":
        raise UsageError("--batch-size auto goes by the memory of a GPU here; with --ray give a number")
    from fluxcli.engine.memory import LargestBatch

    return LargestBatch(checkpoint, engine_config)


def settings(
    machine: "Machine", rows: "Rows", strict: bool = False, step_cache: str = "off", elsewhere: bool = False
) -> tuple["Checkpoint", config.EngineConfig, config.RowDefaults]:
    """What the options mean here, every "auto" and default settled. A `strict` one that changes nothing is refused;
    what runs `elsewhere` is not asked for here."""
    from fluxcli.models.step_cache import parse, settled

    if rows.negative_prompt and rows.true_cfg_scale <= 1:
        raise UsageError("--negative-prompt needs --true-cfg-scale above 1; without it, it would change nothing")
    wanted = parse(step_cache)  # a mistake is told before a model is downloaded
    checkpoint = checkpoint_of(machine, elsewhere and machine.device != "cpu")
    if rows.guidance is not None and not checkpoint.takes_guidance:
        remark = f"--guidance changes nothing: {checkpoint.name} takes no guidance scale"
        if strict:
            raise UsageError(f"{remark} (--strict)")
        say(remark)
    defaults = _row_defaults(checkpoint, rows)
    cache = settled(wanted, checkpoint)
    if refusal := cache.refusal(defaults.num_inference_steps):
        raise UsageError(f"{refusal} (--steps sets those of a row that has none of its own)")
    return checkpoint, engine_settings(machine, cache.on, elsewhere), replace(defaults, step_cache=cache)


def engine_settings(machine: "Machine", step_cache: bool = False, elsewhere: bool = False) -> config.EngineConfig:
    """Raises DeviceError for what is not there: before anything is read or loaded."""
    from fluxcli.engine.attention import backends
    from fluxcli.engine.runtime import device

    asked = (machine.device, machine.dtype, machine.compile, machine.attention, machine.quantization)
    settled = device.resolve(*asked, elsewhere)
    if not elsewhere:
        backends.check(settled.attention, settled.device, device.DTYPES[settled.dtype])
    return replace(settled, step_cache=step_cache)


def _row_defaults(checkpoint: "Checkpoint", rows: "Rows") -> config.RowDefaults:
    own = checkpoint.row_defaults()
    return config.RowDefaults(
        width=rows.width or own.width,
        height=rows.height or own.height,
        num_inference_steps=rows.steps or own.num_inference_steps,
        guidance_scale=own.guidance_scale if rows.guidance is None or not checkpoint.takes_guidance else rows.guidance,
        seed=rows.seed,
        adapters=tuple(checkpoint.adapters.adapter(path, scale) for path, scale in rows.lora),
        adapter=checkpoint.adapters.adapter,
        negative_prompt=rows.negative_prompt if rows.true_cfg_scale > 1 else None,
        true_cfg_scale=max(1.0, rows.true_cfg_scale),
    )
