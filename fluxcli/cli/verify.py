"""`fluxcli verify`."""

import contextlib
import json
from pathlib import Path

import click

from fluxcli.cli.options import example, json_output, verbosity
from fluxcli.cli.settings import say


@click.command(epilog=example("fluxcli verify out --repair"))
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repair", is_flag=True, help="Put right what can be, and remove what the next run can make again.")
@click.option("--yes", is_flag=True, help="Repair without asking.")
@click.option("--complete", is_flag=True, help="Exit with 1 while any image of the job's input is missing too.")
@json_output
@verbosity
@click.pass_context
def verify(ctx: click.Context, /, directory: Path, repair: bool, yes: bool, complete: bool, as_json: bool) -> None:
    """Re-check the job in DIRECTORY: decode, hash and count every image.

    Exits with 1 if anything is not as the manifest says, and stays so.
    """
    from fluxcli.job.report.repair import alone
    from fluxcli.job.report.repair import repair as mend
    from fluxcli.job.report.verify import verify as look

    with alone(directory) if repair else contextlib.nullcontext():
        verdict = look(directory)
        say(verdict.as_lines())
        if as_json:
            click.echo(json.dumps(verdict.as_data(), ensure_ascii=False))
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
