"""`fluxcli gen`."""

import json
from dataclasses import replace
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
    from fluxcli.core.errors import RowError
    from fluxcli.job import single
    from fluxcli.job.input.read import check_row
    from fluxcli.job.output.committed import record_settings
    from fluxcli.job.plan import bucket, size_of
    from fluxcli.models.tokenizers import Tokenizers

    checkpoint, engine_config, defaults = settings(options)
    image = config.ImageFormat(single.check_output(output, num_images) or format, quality)
    try:
        row = {"prompt": prompt, "seed": options["seed"], "num_images": num_images}
        records = check_row(row, 0, 1, defaults)
    except RowError as error:
        raise UsageError(str(error)) from error
    tokens = Tokenizers(checkpoint.tokenizers).count([prompt])[0]
    text_length = bucket(tokens, options["text_lengths"])
    if tokens > text_length:
        say(f"the prompt has {tokens} tokens and is cut to {text_length}")
    records = [replace(record, text_tokens=tokens, text_length=text_length) for record in records]
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
