"""`fluxcli compare`."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxcli.cli.help import Command, ending
from fluxcli.cli.options import json_output, verbosity
from fluxcli.cli.settings import say
from fluxcli.cli.types import Local, Whole
from fluxcli.core.errors import UsageError

if TYPE_CHECKING:
    from fluxcli.job.report.compare import Perceptual

JOB = Local(exists=True, file_okay=False, path_type=Path)


@click.command(
    cls=Command,
    epilog=ending(
        "fluxcli compare out out-fast",
        "fluxcli compare out out-fast --worst 5",
        "fluxcli compare out out-fast --json",
        exits={0: "every row is compared", 1: "nothing could be", 2: "wrong usage", 3: "some rows could not be"},
    ),
)
@click.argument("a", type=JOB)
@click.argument("b", type=JOB)
@click.option("--worst", type=Whole(0), metavar="N", default=20, show_default=True, help="Tell the N farthest apart.")
@json_output
@verbosity
@click.pass_context
def compare(ctx: click.Context, /, a: Path, b: Path, worst: int, as_json: bool) -> None:
    """Measure how far apart two jobs' images of the same rows are.

    A and B are their directories. PSNR in dB, SSIM and, with fluxcli[quality] installed, LPIPS.
    """
    from fluxcli.core.files import json_text
    from fluxcli.job.report import compare_text
    from fluxcli.job.report.compare import compare as measure

    if a.samefile(b):
        raise UsageError(f"{a} and {b} are one directory: nothing to compare")
    comparison = measure(a, b, _perceptual(), worst)
    data = compare_text.data_of(comparison)
    say(compare_text.lines_of(data))
    if as_json:
        click.echo(json_text(data))
    ctx.exit(3 if comparison.not_compared else 0)


def _perceptual() -> "Perceptual | None":
    """LPIPS, where it can be measured."""
    missing = [name for name in ("torchmetrics", "torchvision") if find_spec(name) is None]
    if missing:
        say(f"LPIPS is not measured: {' and '.join(missing)} not installed, which fluxcli[quality] brings")
        return None
    from fluxcli.engine.lpips import Lpips, Unavailable
    from fluxcli.engine.runtime import device

    try:
        return Lpips("cuda" if device.has_gpu() else "cpu")
    except Unavailable as error:
        say(f"LPIPS is not measured: {error}")
        return None
