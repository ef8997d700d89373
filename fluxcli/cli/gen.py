"""`fluxcli gen`."""

import json
from pathlib import Path
from typing import Any

import click

from fluxcli.cli.options import batch_size_option, engine_options, format_options, json_output, row_options, verbosity
from fluxcli.cli.settings import batch_sizes, load_engine, say, settings
from fluxcli.core import config
from fluxcli.core.errors import UsageError


@click.command()
@click.argument("prompt")
@click.option(
    "-n", "--num-images", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Seeds count up."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Directory, or one file's name: its suffix is the format.",
)
@row_options
@format_options
@batch_size_option
@engine_options
@json_output
@verbosity
def gen(
    prompt: str,
    num_images: int,
    output: Path,
    format: str,
    quality: int,
    batch_size: int | str,
    as_json: bool,
    **options: Any,
) -> None:
    """Make images of one PROMPT and print their paths."""
    from fluxcli.job import single
    from fluxcli.job.input.intake import OneRow, take_in
    from fluxcli.job.output.store import record_settings
    from fluxcli.job.plan import size_of
    from fluxcli.models.tokenizers import Tokenizers

    checkpoint, engine_config, defaults = settings(options)
    image = config.ImageFormat(single.check_output(output, num_images) or format, quality)
    row = OneRow({"prompt": prompt, "seed": options["seed"], "num_images": num_images})
    intake = take_in(row, defaults, options["text_lengths"], Tokenizers(checkpoint.tokenizers).count)
    for failure in intake.failures:
        raise UsageError(failure.message)
    records = intake.records(range(len(intake.groups)))
    tokens, text_length = records[0].text_tokens, records[0].text_length
    if tokens > text_length:
        say(f"the prompt has {tokens} tokens and is cut to {text_length}")
    size = size_of(batch_sizes(batch_size, checkpoint, engine_config), records[0].group)
    engine = load_engine(checkpoint, engine_config, single.shapes(records, size))
    made = []
    for record, path in single.generate(engine, records, size, output, image, checkpoint.name):
        text = {"text_tokens": tokens, "text_length": text_length, "truncated": record.truncated}
        made.append({"file_name": str(path), **record_settings(record), **text})
        if not as_json:
            click.echo(str(path))
    if as_json:
        click.echo(json.dumps({"model": checkpoint.name, "images": made}, ensure_ascii=False))
