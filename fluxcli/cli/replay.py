"""`fluxcli replay`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxcli.cli.help import Command, ending
from fluxcli.cli.options import device_option, json_output, verbosity
from fluxcli.cli.settings import load_engine, say
from fluxcli.cli.types import Local, Model

if TYPE_CHECKING:
    from fluxcli.job.replay import Verdict


@click.command(
    cls=Command,
    epilog=ending(
        "fluxcli replay out green-star",
        "fluxcli replay out 000017 --save again.png",
        "fluxcli replay out 000017 --model /models/FLUX.1-dev --json",
        exits={0: "the same bytes, or the same pixels", 1: "it cannot be drawn", 2: "wrong usage", 3: "other pixels"},
    ),
)
@click.argument("directory", type=Local(exists=True, file_okay=False, path_type=Path))
@click.argument("id")
@click.option("--save", type=Local(dir_okay=False, path_type=Path), help="Keep the drawn image in this new file.")
@click.option("-m", "--model", type=Model(), help="Where the job's model is now.  [default: where it was]")
@device_option
@json_output
@verbosity
@click.pass_context
def replay(
    ctx: click.Context,
    /,
    directory: Path,
    id: str,
    save: Path | None,
    model: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Draw one image of a job again and compare it.

    With the settings of its row and the job's, alone in its batch; then held to the file there. A GPU rounds otherwise
    in a batch of another size, so that pixels may differ by some grey levels there.
    """
    from fluxcli.core.errors import JobError
    from fluxcli.core.files import json_text, replacing
    from fluxcli.engine.runtime import device as devices
    from fluxcli.job import replay as job
    from fluxcli.models import checkpoints

    if save is not None and save.exists():
        raise JobError(f"--save {save}: exists already; fluxcli overwrites nothing")
    found = job.made(directory, id)
    wanted = found.format
    config = devices.resolve(device, found.dtype, None, "auto", found.quantization)
    checkpoint = checkpoints.resolve(model or found.model, found.revision if model is None else None)
    found.check(checkpoint)
    record = found.record(checkpoint.adapters)
    engine = load_engine(checkpoint, replace(config, step_cache=bool(found.row.step_cache)), [job.key_of(record)])
    data = job.encoded(found, job.draw(engine, found.row, record), record, checkpoint.label)
    if save is not None:
        try:
            with replacing(save) as file:
                file.write(data)
        except OSError as error:
            raise JobError(f"--save {save}: cannot be written: {error.strerror}") from error
    verdict = job.compare(found, data)
    say(f"{id}: {_told(verdict, wanted.name)}")
    if as_json:
        levels = dict(zip(("most", "mean"), verdict.grey_levels, strict=True)) if verdict.grey_levels else None
        told = {"same": verdict.same or None, "file_is_the_rows": verdict.on_disk, "grey_levels": levels}
        click.echo(json_text({"id": id, **told, "psnr": verdict.psnr}))
    ctx.exit(0 if verdict.same else 3)


def _told(verdict: "Verdict", format: str) -> str:
    if verdict.same == "bytes":
        return "the same file, byte by byte" + ("" if verdict.on_disk else "; the job's own is gone or another by now")
    if verdict.same == "pixels":
        return "the same pixels; the file's other bytes differ"
    if verdict.grey_levels is None:
        return "not the same file, and the job's own cannot be read to say how far it is"
    most, mean = verdict.grey_levels
    decoded = "" if format == "png" else f" of the decoded {format}"
    return f"other pixels{decoded}: {most} grey levels at most, {mean:.3f} on average, PSNR {verdict.psnr:.1f} dB" + (
        "" if verdict.on_disk else "; but the job's file is not the one that its row was written for"
    )
