"""`fluxcli warmup`."""

import json
import time
from collections.abc import Sequence
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
    Processes,
    Rows,
    batch_size_option,
    input_options,
    json_output,
    machine_options,
    process_options,
    shape_options,
    step_cache_option,
    text_lengths_option,
    verbosity,
)
from fluxcli.cli.settings import batch_sizes, load_engine, say, settings
from fluxcli.cli.types import Size
from fluxcli.core import config


@click.command(
    cls=Command,
    epilog=ending(
        "fluxcli warmup prompts.jsonl --batch-size 16",
        "fluxcli warmup --size 1024x1024 --export cache.zip --key cache.key",
        "fluxcli warmup --import cache.zip --key cache.key",
        exits={0: "all is ready", 1: "could not be made ready; the message says why", 2: "wrong usage"},
        environment={"FLUXCLI_CACHE": "where compiled code is kept; else ~/.cache/fluxcli"},
    ),
)
@click.argument("input", type=INPUT, required=False)
@click.option("--size", "sizes", type=Size(), multiple=True, help="Instead of INPUT. May be given several times.")
@click.option(
    "--export",
    type=FILE,
    help="Write what these shapes need to FILE, for machines like this one. Without --key it carries what was measured "
    "and no compiled code.",
)
@click.option(
    "--import",
    "import_",
    type=FILE,
    help="Fill the cache from such a FILE. Compiled code in it will run here, with all that you may do: it is taken in "
    "only if it was signed with your --key.",
)
@click.option(
    "--key",
    type=FILE,
    help="FILE with a secret of yours: it signs what --export writes, and proves to --import who wrote that. --export "
    "makes one where there is none.",
)
@input_options
@batch_size_option
@shape_options
@step_cache_option
@text_lengths_option
@machine_options
@process_options
@json_output
@verbosity
@click.pass_context
def warmup(
    ctx: click.Context,
    /,
    input: str | None,
    sizes: Sequence[tuple[int, int]],
    export: Path | None,
    import_: Path | None,
    key: Path | None,
    reading: Input,
    batch_size: int | str,
    rows: Rows,
    step_cache: str,
    text_lengths: tuple[int, ...],
    machine: Machine,
    processes: Processes,
    as_json: bool,
) -> None:
    """Compile and cache what a job's shapes need.

    The shapes are those of INPUT, or of the given sizes. A later batch on the same shapes compiles nothing. With
    --import and neither INPUT nor --size nothing is compiled.
    """
    from fluxcli.core.records import Group, WarmUp
    from fluxcli.engine.runtime import cache_archive, compile_cache, sealed
    from fluxcli.job.fleet.warming import warm_up
    from fluxcli.job.input.keys import Columns
    from fluxcli.job.job import Job
    from fluxcli.job.plan import size_of
    from fluxcli.worker import processes as chosen_processes

    if input is not None and sizes:
        raise click.UsageError("give INPUT or --size, not both")
    if key is not None and export is None and import_ is None:
        raise click.UsageError("--key goes with --export or --import")
    if processes.ray is not None and (export is not None or import_ is not None):
        raise click.UsageError("--export and --import are for this machine's cache, and --ray is for those of others")
    several = chosen_processes(processes.gpus, processes.workers, processes.ray, machine.device)
    if several is not None:
        ctx.call_on_close(several.close)
        machine = replace(machine, device=several.device)
    elsewhere = several is not None and several.elsewhere
    checkpoint, engine_config, defaults = settings(machine, rows, step_cache=step_cache, elsewhere=elsewhere)
    if export is not None:
        cache_archive.check_export(export)
        if key is None:
            say("without --key the exported file carries what was measured, and no compiled code")
        elif import_ is None and sealed.make_key(key):
            say(f"{key}: a new key, which signs the exported file; copy it to where that is to be imported, in secret")
    secret = None if key is None else sealed.read_key(key)
    if import_ is not None:
        entries = cache_archive.import_(compile_cache.CompileCache(checkpoint, engine_config), import_, secret)
        say(f"{import_}: {entries} entries; cache: {compile_cache.root()}")
        if input is None and not sizes and export is None:
            if as_json:
                click.echo(json.dumps({"imported": entries, "cache": str(compile_cache.root())}))
            return
    sizes_of = batch_sizes(batch_size, checkpoint, engine_config)
    if input is not None:
        job = Job(
            *(input, Path(), checkpoint, engine_config, defaults, text_lengths, config.ImageFormat(), sizes_of),
            format=reading.input_format,
            columns=Columns(reading.prompt_column, reading.id_column),
        )
        with closing(job.source(say)) as source:
            keys = job.whole_plan(source, say).shapes()
    else:
        chosen = sizes or [(defaults.width, defaults.height)]
        branches = 2 if defaults.true_cfg_scale > 1 else 1
        groups = {Group(height, width, length, 1, branches) for width, height in chosen for length in text_lengths}
        wanted = [group.shape(size_of(sizes_of, group)) for group in groups]
        keys = sorted(wanted, key=lambda key: (key.tokens(), key), reverse=True)
    start = time.perf_counter()

    def tell(one: WarmUp) -> None:
        say(f"{one.key}: {one.seconds:.2f} s, {one.state}, {one.attention} attention")

    if several is None:
        shapes = load_engine(checkpoint, engine_config, keys).warm_up(keys, tell)
    else:
        shapes = warm_up(several.workers(checkpoint, engine_config), keys, tell, say)
    seconds = time.perf_counter() - start
    cache = None if elsewhere else str(compile_cache.root())
    say(f"{len(shapes)} shapes in {seconds:.1f} s with the model's loading; cache: {cache or 'that of each machine'}")
    if export is not None:
        size = cache_archive.export(compile_cache.CompileCache(checkpoint, engine_config), export, secret)
        say(f"{export}: {size / 1e6:.1f} MB")
    if as_json:
        data = [
            {**one.key.told(), "seconds": round(one.seconds, 3), "state": one.state, "attention": one.attention}
            for one in shapes
        ]
        click.echo(json.dumps({"shapes": data, "seconds": round(seconds, 3), "cache": cache}))
