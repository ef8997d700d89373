"""`fluxcli calibrate`."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click

from fluxcli.cli.help import Command, ending
from fluxcli.cli.options import (
    FILE,
    INPUT,
    Input,
    Machine,
    Rows,
    input_options,
    json_output,
    machine_options,
    row_options,
    text_lengths_option,
    verbosity,
)
from fluxcli.cli.settings import load_engine, say, settings
from fluxcli.cli.types import Whole
from fluxcli.core.step_cache import PRESETS, StepCache


@click.command(
    cls=Command,
    epilog=ending(
        "fluxcli calibrate prompts.jsonl -o own.json",
        "fluxcli calibrate prompts.jsonl -o own.json --steps 50 --limit 16",
        "fluxcli calibrate demo -m tiny -o tiny.json --limit 2",
        exits={0: "measured", 1: "could not be; the message says what to do", 2: "wrong usage"},
    ),
)
@click.argument("input", type=INPUT)
@click.option("-o", "--output", type=FILE, required=True, help="The file to write.")
@click.option("--limit", type=Whole(1), metavar="N", default=8, show_default=True, help="Use the first N rows.")
@input_options
@row_options
@text_lengths_option
@machine_options
@json_output
@verbosity
def calibrate(
    input: str,
    output: Path,
    limit: int,
    reading: Input,
    rows: Rows,
    text_lengths: tuple[int, ...],
    machine: Machine,
    as_json: bool,
) -> None:
    """Measure which steps of a model can be spared.

    It draws the first rows of INPUT. What it writes is FILE in --step-cache FILE:balanced.

    Every image is drawn with --steps steps, whatever its row says.
    """
    import json
    from statistics import fmean

    from fluxcli.core.errors import InputError, JobError, UsageError
    from fluxcli.core.records import Batch, ShapeKey
    from fluxcli.job.input.intake import take_in
    from fluxcli.job.input.keys import Columns
    from fluxcli.job.input.read import PromptFile
    from fluxcli.models import step_cache
    from fluxcli.models.tokenizers import Tokenizers

    if output.exists():
        raise JobError(f"-o {output}: exists already; fluxcli overwrites nothing")
    if not output.parent.is_dir():
        raise JobError(f"-o {output}: there is no directory {output.parent}")
    checkpoint, engine_config, defaults = settings(machine, rows)
    steps = defaults.num_inference_steps
    if steps < 2:
        raise UsageError(f"--steps {steps}: a step is measured against the one before it")
    columns = Columns(reading.prompt_column, reading.id_column)
    with closing(PromptFile(input, reading.input_format, columns)) as source:
        count = Tokenizers(checkpoint.tokenizers).count
        intake = take_in(source, defaults, text_lengths, count, limit=limit)
        for failure in intake.failures:
            raise InputError(f"{source.name}, line {failure.line}: {failure.message}")
        records = intake.records(range(min(limit, len(intake.groups))))  # a row may ask for many images
    if not records:
        raise InputError(f"{source.name}: has no rows")
    keys = [each.group.shape(1) for each in records]
    shapes = sorted(set(keys), key=ShapeKey.tokens, reverse=True)
    engine = load_engine(checkpoint, replace(engine_config, step_cache=True), shapes)
    engine.warm_up(shapes)
    measured = []
    for index, (key, record) in enumerate(zip(keys, records, strict=True)):
        measured.append(engine.ratios(Batch(index, key, steps, [record], adapters=record.adapters)))
        say(f"{index + 1} of {len(records)} measured: {key}, {steps} steps")
    ratios = list(map(fmean, zip(*measured, strict=True)))
    step_cache.write(output, checkpoint.label, len(records), ratios)
    masks = {name: StepCache(name, step_cache.read(output)).mask(steps) for name in PRESETS}
    for name, mask in masks.items():
        say(f"{name:>8}: {mask.count('1')} of {steps} steps evaluated, {mask}")
    if as_json:
        click.echo(json.dumps({"file_name": str(output), "ratios": ratios, "masks": masks}))
    else:
        click.echo(str(output))
