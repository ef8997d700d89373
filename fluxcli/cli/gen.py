"""`fluxcli gen`."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from fluxcli.cli.help import Command, ending
from fluxcli.cli.options import (
    Files,
    Machine,
    Rows,
    batch_size_option,
    format_options,
    json_output,
    machine_options,
    row_options,
    step_cache_option,
    text_lengths_option,
    verbosity,
)
from fluxcli.cli.settings import batch_sizes, load_engine, say, settings
from fluxcli.cli.types import Local, Whole
from fluxcli.core import config
from fluxcli.core.terminal import show
from fluxcli.job.run import signals

_MOST_PROMPTS = 10_000
_MOST_BYTES = 16 * 2**20


class _Prompted(Command):
    """Says what to do about a prompt that looks like an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            unknown = isinstance(error, click.NoSuchOption) and not error.option_name.startswith("--")
            if unknown or any(arg.startswith("-") and " " in arg and "=" not in arg for arg in given):
                hint = 'a prompt that begins with - goes last, after --: fluxcli gen -- "-1 degrees"'
                raise click.UsageError(f"{error.format_message().rstrip('.')}; {hint}", ctx) from error
            raise


def _texts(ctx: click.Context, param: click.Parameter, prompts: tuple[str, ...]) -> list[str]:
    """The prompts, those of standard input in the place of -."""
    found: list[str] = []
    for prompt in prompts:
        found += _lines() if prompt == "-" else [_text(ctx, param, prompt)]
        if len(found) > _MOST_PROMPTS:
            raise click.BadParameter(f"more than {_MOST_PROMPTS} prompts are a job: fluxcli batch", ctx, param)
    if not found:
        raise click.BadParameter("standard input holds no prompt", ctx, param)
    return found


def _lines() -> list[str]:
    """Prompts from standard input, one a line; blank lines are none."""
    data = sys.stdin.buffer.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise click.UsageError(
            f"standard input: more than {_MOST_BYTES // 2**20} MiB of prompts are a job: fluxcli batch"
        )
    try:
        return [line for line in re.split("[\r\n]", data.decode("utf-8-sig")) if line.strip()]
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input: is not valid UTF-8: {error}") from error


def _text(ctx: click.Context, param: click.Parameter, prompt: str) -> str:
    try:
        if any("\udc80" <= char <= "\udcff" for char in prompt):  # bytes that Python could not read in this locale
            prompt = os.fsencode(prompt).decode("utf-8")
        prompt.encode("utf-8")
    except UnicodeError as error:
        raise click.BadParameter(f"is not valid UTF-8: {error}", ctx, param) from error
    return prompt


@click.command(
    cls=_Prompted,
    epilog=ending(
        'fluxcli gen "a green star on a white background"',
        'fluxcli gen "a red circle above a blue square" -n 4 --seed 7 -o shapes',
        'fluxcli gen "a fox in the snow" -m black-forest-labs/FLUX.1-dev -o fox.webp',
        exits={
            0: "every image is written",
            1: "none could be made; the message says what to do",
            2: "wrong usage",
            3: "some could not be made",
            "130, 143": "stopped by Ctrl-C or SIGTERM",
        },
    ),
)
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True, callback=_texts)
@click.option(
    "-n",
    "--num-images",
    type=Whole(1, 10_000),
    metavar="N",
    default=1,
    show_default=True,
    help="Of each prompt; seeds count up.",
)
@click.option(
    "-o",
    "--output",
    type=Local(path_type=Path),
    default=Path(),
    help="Directory, or one file's name: its suffix is the format.",
)
@row_options
@step_cache_option
@format_options
@batch_size_option
@text_lengths_option
@machine_options
@json_output
@verbosity
@click.pass_context
def gen(
    ctx: click.Context,
    /,
    prompts: list[str],
    num_images: int,
    output: Path,
    rows: Rows,
    files: Files,
    batch_size: int | str,
    step_cache: str,
    text_lengths: tuple[int, ...],
    machine: Machine,
    as_json: bool,
) -> None:
    """Make images of each PROMPT and print their paths.

    - is standard input, a prompt on each line.
    """
    from fluxcli.core.files import json_text
    from fluxcli.core.records import Failure
    from fluxcli.job import single
    from fluxcli.job.output.committed import record_settings
    from fluxcli.job.output.images import comment_truncated
    from fluxcli.models.scope import Scope
    from fluxcli.models.tokenizers import Tokenizers

    checkpoint, engine_config, defaults = settings(machine, rows, step_cache=step_cache)
    image = config.ImageFormat(single.check_output(output, len(prompts) * num_images) or files.format, files.quality)
    tokenizers = Tokenizers(checkpoint.tokenizers)
    records = single.requested(prompts, rows.seed, num_images, defaults, tokenizers, text_lengths)
    cache, steps = defaults.step_cache, defaults.num_inference_steps
    for record in records[::num_images]:
        if record.truncated:
            which = "the prompt" if len(prompts) == 1 else show(record.prompt)
            say(f"{which} has {record.text_tokens} tokens and is cut to {record.text_length}")
    scope = Scope(checkpoint)
    scope.look_at(prompts)
    for line in scope.lines([record.group for record in records]):
        say(line)
    size = batch_sizes(batch_size, checkpoint, engine_config)
    made: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []

    def tell() -> None:
        if as_json:
            failures = {"failures": failed} if failed else {}
            click.echo(json_text({"model": checkpoint.name, "images": made, **failures}))

    def leave(stopped: signals.Stopped) -> None:
        say(f"{stopped}; {len(made)} of {len(records)} images are written")
        tell()

    with signals.last_words(leave):
        engine = load_engine(checkpoint, engine_config, single.shapes(records, size))
        try:
            for record, outcome in single.generate(engine, records, size, cache, output, image, checkpoint.label):
                if isinstance(outcome, Failure):
                    say(f"seed {record.seed}: {outcome.message}; nothing is written for it")
                    failed.append({"seed": record.seed, "error": outcome.as_row()["error"]})
                    continue
                text = {name: getattr(record, name) for name in ("text_tokens", "text_length", "truncated")}
                made.append({"file_name": str(outcome), **record_settings(record), **cache.told(steps), **text})
                if comment_truncated(image, record, checkpoint.label):
                    made[-1]["comment_truncated"] = True
                if not as_json:
                    click.echo(str(outcome))
        except signals.Stopped as stopped:
            leave(stopped)
            ctx.exit(stopped.exit_code)
    tell()
    if failed:
        ctx.exit(3 if made else 1)
