"""`fluxcli status`."""

import json
from pathlib import Path

import click

from fluxcli.cli.options import example, json_output, verbosity


@click.command(epilog=example("fluxcli status out"))
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_output
@verbosity
def status(directory: Path, as_json: bool) -> None:
    """Tell how far the job in DIRECTORY is.

    Images done, failed and missing, and the time left, while it runs or after. Looks at no image: fluxcli verify does.
    """
    from fluxcli.job.report.status import status as look

    found = look(directory)
    if as_json:
        click.echo(json.dumps(found.as_data()))
    else:
        click.echo(found.as_lines())
