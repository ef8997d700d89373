"""The `fluxcli` command: its group, and errors made into a line or two and an exit code."""

import os
import sys
import warnings
from typing import Any

import click

from fluxcli import __version__
from fluxcli.cli import streams
from fluxcli.cli.batch import batch
from fluxcli.cli.bench import bench
from fluxcli.cli.calibrate import calibrate
from fluxcli.cli.compare import compare
from fluxcli.cli.gen import gen
from fluxcli.cli.help import ending
from fluxcli.cli.options import verbosity
from fluxcli.cli.replay import replay
from fluxcli.cli.settings import complain, say
from fluxcli.cli.status import status
from fluxcli.cli.streams import Unwritable
from fluxcli.cli.verify import verify
from fluxcli.cli.warmup import warmup
from fluxcli.core.errors import FluxcliError, Remark
from fluxcli.job.run import signals


class _Cli(click.Group):
    """Turns every error into a line or two on stderr and an exit code; -v shows the traceback too."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        streams.be_quiet(False)
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            complain(error.format_message())
            sys.exit(error.exit_code)
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else "fluxcli"
            sys.exit(_tell(f"{error.format_message()} (see {path} --help)", error.exit_code))
        except click.ClickException as error:
            sys.exit(_tell(error.format_message(), error.exit_code))
        except click.Abort:
            sys.exit(_tell("no answer on standard input", 1))
        except FluxcliError as error:
            sys.exit(_told(error))
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        warnings.simplefilter("ignore")  # the libraries' remarks to their own users
        warnings.simplefilter("once", Remark)
        warnings.showwarning = lambda message, *where: say(f"Warning: {message}")
        if os.environ.get("NO_COLOR"):
            ctx.color = False
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if ctx.meta.get("fluxcli.verbose") and not isinstance(error, signals.Stopped):
                import traceback  # which takes milliseconds

                complain(traceback.format_exc().rstrip())
            ctx.exit(_told(error))


def _told(error: Exception) -> int:
    """Says what went wrong; the exit code."""
    if isinstance(error, signals.Stopped):
        complain(str(error))
        return error.exit_code
    if isinstance(error, Unwritable) and error.quiet:
        return error.exit_code
    if isinstance(error, FluxcliError):
        return _tell(str(error), error.exit_code)
    return _tell(f"{type(error).__name__}: {error} (-v shows where)", 1)


def _tell(message: str, exit_code: int) -> int:
    complain(f"Error: {message}")
    return exit_code


@click.group(
    cls=_Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=ending(
        'fluxcli gen "a green star on a white background"',
        "fluxcli batch prompts.jsonl -o out",
        "fluxcli batch demo -o out",
        exits={
            0: "done",
            1: "nothing more could be done; the message says what to do",
            2: "wrong usage",
            3: "done, but for rows that failed",
            "130, 143": "stopped by Ctrl-C or SIGTERM",
        },
        environment={
            "FLUXCLI_MODEL": "the default of --model",
            "FLUXCLI_CACHE": "where compiled code is kept; else ~/.cache/fluxcli",
            "HF_HOME": "where models from the hub are kept",
            "HF_TOKEN": "by whose leave models come from the hub",
            "NO_COLOR": "no colour",
        },
    ),
)
@click.version_option(__version__, prog_name="fluxcli")
@verbosity
def cli() -> None:
    """Prompts in, FLUX.1 images and timing manifests out: fast, resumable, and never losing one."""


for each in (gen, batch, warmup, bench, calibrate, status, verify, compare, replay):
    cli.add_command(each)


def main() -> None:
    signals.install()
    streams.protect()
    cli(prog_name="fluxcli")
