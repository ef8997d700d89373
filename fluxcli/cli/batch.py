"""`fluxcli batch`."""

import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from fluxcli.cli.help import Command, ending
from fluxcli.cli.options import (
    INPUT,
    Files,
    Input,
    Machine,
    Processes,
    Rows,
    _read_config,
    batch_size_option,
    format_options,
    input_options,
    json_output,
    machine_options,
    process_options,
    row_options,
    step_cache_option,
    text_lengths_option,
    verbosity,
)
from fluxcli.cli.settings import batch_sizes, load_engine, say, settings
from fluxcli.cli.streams import is_quiet
from fluxcli.cli.types import Local, Whole
from fluxcli.core import config
from fluxcli.core.errors import UsageError


@click.command(
    cls=Command,
    epilog=ending(
        "fluxcli batch prompts.jsonl -o out",
        "fluxcli batch prompts.csv -o out --prompt-column caption --dry-run",
        "fluxcli batch prompts.jsonl -m black-forest-labs/FLUX.1-dev --gpus all",
        exits={
            0: "every row has its image",
            1: "nothing more could be done; the message says what to do",
            2: "wrong usage",
            3: "finished, and some rows failed: see failures.jsonl",
            "130, 143": "stopped by Ctrl-C or SIGTERM; run it again to go on",
        },
    ),
)
@click.argument("input", type=INPUT)
@click.option(
    "-o",
    "--output",
    type=Local(file_okay=False, path_type=Path),
    help="The job's directory; standard input needs one.  [default: out/INPUT]",
)
@click.option(
    "--config",
    type=Local(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file with any of these options; the command line wins.",
)
@input_options
@batch_size_option
@click.option(
    "-n",
    "--num-images",
    type=Whole(1, config.MOST_IMAGES_OF_ROW),
    metavar="N",
    default=1,
    show_default=True,
    help="Images of a row that has no number of its own, as ID-0, ID-1, ...",
)
@click.option("--limit", type=Whole(0), metavar="N", help="Use the first N rows only.")
@format_options
@click.option("--dry-run", is_flag=True, help="Show the plan; make nothing.")
@click.option("--strict", is_flag=True, help="Stop before any work if a row is bad.")
@click.option("--max-failures", type=Whole(0), metavar="N", help="Stop when more than N rows failed.")
@click.option(
    "--retry-failed/--no-retry-failed", default=True, show_default=True, help="Try rows again that failed before."
)
@click.option("--append", is_flag=True, help="Add the rows of another input to the job in the directory.")
@click.option("--force", is_flag=True, help="If the directory holds another job, start over in a new one beside it.")
@row_options
@step_cache_option
@text_lengths_option
@machine_options
@process_options
@json_output
@verbosity
@click.pass_context
def batch(
    ctx: click.Context,
    /,
    input: str,
    output: Path | None,
    reading: Input,
    batch_size: int | str,
    num_images: int,
    limit: int | None,
    files: Files,
    dry_run: bool,
    strict: bool,
    max_failures: int | None,
    retry_failed: bool,
    append: bool,
    force: bool,
    rows: Rows,
    step_cache: str,
    text_lengths: tuple[int, ...],
    machine: Machine,
    processes: Processes,
    as_json: bool,
) -> None:
    """Run a job: every row of INPUT becomes an image.

    INPUT is .jsonl, .json, .txt, .csv or .tsv, each also .gz or .zst, or .parquet; - is standard input; demo is sixteen
    rows for the built-in model. What a row says of its image goes before the options.

    The same command again finishes what is missing.
    """
    from fluxcli.core.files import json_text
    from fluxcli.engine.runtime import device
    from fluxcli.job.input.keys import Columns
    from fluxcli.job.input.read import is_descriptor, job_name
    from fluxcli.job.job import Job
    from fluxcli.job.report import text as report
    from fluxcli.job.report.forecast import forecast
    from fluxcli.worker import processes as chosen_processes

    if output is None and is_descriptor(input):
        raise UsageError("rows from a stream have no name to call a job by: give -o DIR")
    several = chosen_processes(processes.gpus, processes.workers, processes.ray, machine.device)
    if several is not None:
        ctx.call_on_close(several.close)
        machine = replace(machine, device=several.device)
    elsewhere = several is not None and several.elsewhere
    checkpoint, engine_config, defaults = settings(machine, rows, strict, step_cache, elsewhere)
    job = Job(
        input,
        output or Path("out") / job_name(input),
        checkpoint,
        engine_config,
        replace(defaults, num_images=num_images),
        text_lengths,
        config.ImageFormat(files.format, files.quality),
        batch_sizes(batch_size, checkpoint, engine_config),
        limit,
        strict,
        max_failures,
        retry_failed,
        reading.input_format,
        Columns(reading.prompt_column, reading.id_column),
        append,
        tuple(sys.argv),
    )
    if force:
        moved = job.in_free_directory()
        if moved.directory != job.directory:
            say(f"{job.directory} holds another job: starting over in {moved.directory}")
        job = moved
    if dry_run:
        with closing(job.source(say)) as source:
            intake, plan = job.preview(source, say)
        data = report.plan_data(intake, plan)
        data["workers"] = len(several.names) if several else 1
        data["forecast"] = forecast(job.directory, intake.groups, data["workers"])
        if as_json:
            click.echo(json_text({"directory": str(job.directory), **data}))
        else:
            lines = (*report.remark_lines(intake.tally), *intake.remarks, *report.failure_lines(intake.failures))
            say("\n".join([report.plan_table(data), *lines]))
        ctx.exit(3 if intake.failures or intake.skipped else 0)

    def tell(status: int, totals: dict[str, Any]) -> None:
        if told := report.totals_lines(totals, stopped=status > 128, limit=job.limit):
            say(told)
        if totals["failures"]:
            say(f"failed rows: {job.directory / 'failures.jsonl'}")
        if as_json:
            click.echo(json_text({"directory": str(job.directory), **totals, "exit_status": status}))

    own = partial(load_engine, checkpoint, engine_config)
    engines = own if several is None else several.workers(checkpoint, engine_config)
    status, totals = job.run(engines, device.machine(engine_config), say, tell, is_quiet())
    tell(status, totals)
    ctx.exit(status)
