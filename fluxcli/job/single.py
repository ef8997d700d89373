"""`fluxcli gen`: one prompt, a few pictures, plain files; no job directory."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from fluxcli.config import ImageFormat
from fluxcli.errors import JobError
from fluxcli.job import images
from fluxcli.job.runner import Engine
from fluxcli.records import Batch, PromptRecord, ShapeKey

_SLUG = 48  # characters of the prompt in a file name


def generate(
    engine: Engine, records: Sequence[PromptRecord], batch_size: int, output: Path, format: ImageFormat, model: str
) -> Iterator[tuple[PromptRecord, Path]]:
    """Makes and writes each record's picture; never over an existing file."""
    for index, start in enumerate(range(0, len(records), batch_size)):
        part = records[start : start + batch_size]
        first = part[0]
        key = ShapeKey(len(part), first.height, first.width, first.text_length)
        pictures = engine.submit(Batch(index, key, first.num_inference_steps, part)).result()
        for slot, record in enumerate(part):
            if not pictures.finite[slot]:
                raise JobError(f"seed {record.seed}: the model's output is not finite; nothing is written for it")
            data = images.encode(pictures.pixels[slot], format, record, model)
            with _create(output, record, format) as file:
                file.write(data)
                yield record, Path(file.name)


def check_output(output: Path, count: int) -> None:
    """Refuses early what could not be written in the end."""
    if _is_file_name(output):
        if count > 1:
            raise JobError(f"-o {output}: {count} images need a directory, not a file name")
        if output.exists():
            raise JobError(f"-o {output}: exists already; fluxcli overwrites nothing")


def _is_file_name(output: Path) -> bool:
    return not output.is_dir() and output.suffix.lower() in (".png", ".jpg", ".webp")


def _create(output: Path, record: PromptRecord, format: ImageFormat) -> IO[bytes]:
    try:
        if _is_file_name(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            return output.open("xb")
        output.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", record.prompt.lower()).strip("-")[:_SLUG].strip("-") or "image"
        number = 1
        while True:
            again = f"-{number}" if number > 1 else ""
            try:
                return (output / f"{slug}-{record.seed}{again}{format.suffix}").open("xb")
            except FileExistsError:
                number += 1
    except OSError as error:
        raise JobError(f"-o {output}: cannot be written: {error.strerror}") from error
