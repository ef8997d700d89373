"""`fluxcli gen`."""

import os
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
from fluxcli.job.run import signals


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
@click.argument("prompt", callback=_text)
@click.option(
    "-n",
    "--num-images",
    type=Whole(1, 10_000),
    metavar="N",
    default=1,
    show_default=True,
    help="How many; seeds count up.",
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
    prompt: str,
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
    """Make images of one PROMPT and print their paths."""
    from fluxcli.core.files import json_text
    from fluxcli.core.records import Failure
    from fluxcli.job import single
    from fluxcli.job.output.committed import record_settings
    from fluxcli.job.output.images import comment_truncated
    from fluxcli.job.plan import size_of
    from fluxcli.models.scope import Scope
    from fluxcli.models.tokenizers import Tokenizers

    checkpoint, engine_config, defaults = settings(machine, rows, step_cache=step_cache)
    image = config.ImageFormat(single.check_output(output, num_images) or files.format, files.quality)
    tokenizers = Tokenizers(checkpoint.tokenizers)
    records = single.requested(prompt, rows.seed, num_images, defaults, tokenizers, text_lengths)
    cache, steps = defaults.step_cache, defaults.num_inference_steps
    tokens, text_length = records[0].text_tokens, records[0].text_length
    if records[0].truncated:
        say(f"the prompt has {tokens} tokens and is cut to {text_length}")
    scope = Scope(checkpoint)
    scope.look_at([prompt])
    for line in scope.lines([records[0].group]):
        say(line)
    size = size_of(batch_sizes(batch_size, checkpoint, engine_config), records[0].group)
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
                text = {"text_tokens": tokens, "text_length": text_length, "truncated": record.truncated}
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
