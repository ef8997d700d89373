"""`fluxcli bench`."""

from collections.abc import Sequence
from functools import partial

import click

from fluxcli.cli.help import Command, ending
from fluxcli.cli.options import (
    TEXT_LENGTHS,
    Machine,
    Rows,
    choice,
    json_output,
    machine_options,
    step_cache_option,
    verbosity,
)
from fluxcli.cli.settings import load_engine, say, settings
from fluxcli.cli.types import Numbers, Size, Whole
from fluxcli.core import config


@click.command(
    cls=Command,
    epilog=ending(
        "fluxcli bench -m random:flux-dev",
        "fluxcli bench -m random:flux-dev --batch-size 1,16 --vs diffusers",
        "fluxcli bench -m tiny --size 128x128 --batch-size 4 --json",
        exits={0: "all is measured", 1: "a shape or a peer could not be; the rest is told", 2: "wrong usage"},
    ),
)
@click.option(
    "--size",
    "sizes",
    type=Size(),
    multiple=True,
    help="Of an image. May be given several times.  [default: the model's]",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=Numbers("batch sizes", config.MOST_IMAGES),
    default=(1, config.BATCH_SIZE),
    help=f"Images per batch, one figure or several.  [default: 1,{config.BATCH_SIZE}]",
)
@click.option(
    "--text-lengths",
    type=TEXT_LENGTHS,
    default=(config.MAX_TEXT_LENGTH,),
    help=f"Lengths of prompts, in T5 tokens.  [default: {config.MAX_TEXT_LENGTH}, the reference setting]",
)
@click.option("--steps", type=Whole(1, config.MAX_STEPS), metavar="N", help="Of a whole image.  [default: the model's]")
@step_cache_option
@click.option(
    "--vs",
    type=choice("diffusers", "torchao"),
    help="Also run this on the same weights: diffusers, eager and compiled; or compiled, and in 8 bits by torchao.",
)
@click.option("--cold-start", is_flag=True, help="Also time two new processes: with empty caches, then from the cache.")
@machine_options
@json_output
@verbosity
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    text_lengths: Sequence[int],
    steps: int | None,
    step_cache: str,
    vs: str | None,
    cold_start: bool,
    machine: Machine,
    as_json: bool,
) -> None:
    """Measure this machine: a denoising step, and whole images.

    A step stands beside what its matrix products and attention alone take, and with --vs beside diffusers; an image is
    told by stage.
    """
    import json

    from fluxcli.bench import table
    from fluxcli.bench.bench import Bench
    from fluxcli.core.records import ShapeKey
    from fluxcli.job.output import images

    rows = Rows(width=None, height=None, steps=steps, guidance=None, seed=0)
    checkpoint, engine_config, defaults = settings(machine, rows, step_cache=step_cache)
    keys = [
        ShapeKey(batch_size, height, width, length)
        for width, height in sizes or [(defaults.width, defaults.height)]
        for batch_size in batch_sizes
        for length in text_lengths
    ]
    run = Bench(
        checkpoint,
        engine_config,
        keys,
        defaults.num_inference_steps,
        defaults.guidance_scale,
        defaults.step_cache,
        vs,
        cold_start,
    )
    status, result = run.run(
        partial(load_engine, checkpoint, engine_config),
        lambda pixels, record: images.encode(pixels, config.ImageFormat(), record, checkpoint.name),
        say,
    )
    say(f"\n{table.text(result)}")
    if as_json:
        click.echo(json.dumps(result))
    ctx.exit(status)
