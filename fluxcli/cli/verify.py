"""`fluxcli verify`."""

import contextlib
from pathlib import Path

import click

from fluxcli.cli.help import Command, ending
from fluxcli.cli.options import json_output, verbosity
from fluxcli.cli.settings import say
from fluxcli.cli.types import Local


@click.command(
    cls=Command,
    epilog=ending(
        "fluxcli verify out",
        "fluxcli verify out --repair",
        "fluxcli verify out --complete",
        exits={0: "all is as the manifest says", 1: "something is not", 2: "wrong usage"},
    ),
)
@click.argument("directory", type=Local(exists=True, file_okay=False, path_type=Path))
@click.option("--repair", is_flag=True, help="Put right what can be, and remove what the next run can make again.")
@click.option("--yes", is_flag=True, help="With --repair: do it without asking.")
@click.option("--complete", is_flag=True, help="Exit with 1 while any image of the job's input is missing too.")
@json_output
@verbosity
@click.pass_context
def verify(ctx: click.Context, /, directory: Path, repair: bool, yes: bool, complete: bool, as_json: bool) -> None:
    """Re-check a job: decode, hash and count every image."""
    from fluxcli.core.files import json_text
    from fluxcli.job.report.repair import alone
    from fluxcli.job.report.repair import repair as mend
    from fluxcli.job.report.verify import verify as look

    if yes and not repair:
        raise click.UsageError("--yes goes with --repair")
    with alone(directory) if repair else contextlib.nullcontext():
        verdict = look(directory)
        say(verdict.as_lines())
        if as_json:
            click.echo(json_text(verdict.as_data()))
        wrong = bool(verdict.problems)
        if repair and wrong and (yes or click.confirm("Remove all of these?", err=True)):
            left = mend(verdict)
            for line in left:
                say(f"left: {line}")
            say("removed; run the job again to make what is missing")
            wrong = bool(left)
    if complete and verdict.missing is None:
        say("how many images there should be is not written down: run the job once more")
    ctx.exit(1 if wrong or (complete and verdict.missing != 0) else 0)
