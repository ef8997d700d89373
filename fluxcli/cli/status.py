"""`fluxcli status`."""

from pathlib import Path

import click

from fluxcli.cli.help import Command, ending
from fluxcli.cli.options import json_output, verbosity
from fluxcli.cli.types import Local


@click.command(
    cls=Command,
    epilog=ending(
        "fluxcli status out",
        "fluxcli status out --json",
        "fluxcli status out-fast",
        exits={0: "it is told", 1: "there is no job, or a file of it is damaged", 2: "wrong usage"},
    ),
)
@click.argument("directory", type=Local(exists=True, file_okay=False, path_type=Path))
@json_output
@verbosity
def status(directory: Path, as_json: bool) -> None:
    """Tell how far a job is.

    Images done, failed and missing, and the time left, while it runs or after. Looks at no image: fluxcli verify does.
    """
    from fluxcli.core.files import json_text
    from fluxcli.job.report.status import status as look

    found = look(directory)
    click.echo(json_text(found.as_data()) if as_json else found.as_lines())
