"""`fluxcli gen`: a few prompts, a few images, plain files; no job directory."""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from fluxcli.core.config import ImageFormat, RowDefaults
from fluxcli.core.errors import JobError, UsageError, first_line
from fluxcli.core.files import replacing
from fluxcli.core.records import Batch, Failure, Images, PromptRecord, ShapeKey
from fluxcli.core.step_cache import StepCache
from fluxcli.job.input.intake import OneRow, take_in
from fluxcli.job.output import images
from fluxcli.job.plan import BatchSize, size_of
from fluxcli.job.run import signals
from fluxcli.job.run.lanes import Engine
from fluxcli.models.tokenizers import Tokenizers

_SLUG = 48  # characters of the prompt in a file name
# What makes -o a file's name; None for images of other programs.
_SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"} | dict.fromkeys(
    (".avif", ".bmp", ".gif", ".heic", ".tif", ".tiff")
)


def requested(
    prompts: Sequence[str],
    seed: int,
    count: int,
    defaults: RowDefaults,
    tokenizers: Tokenizers,
    text_lengths: Sequence[int],
) -> list[PromptRecord]:
    """Prompts as records, `count` of each, seeds counting up from the same.

    Raises:
        UsageError: what a row of a job would fail for.
    """
    records = []
    for prompt in prompts:
        row = OneRow({"prompt": prompt, "seed": seed, "num_images": count})
        intake = take_in(row, defaults, tuple(text_lengths), tokenizers.count)
        for failure in intake.failures:
            raise UsageError(failure.message)
        records += intake.records(range(len(intake.groups)))
    return records


def batches(records: Sequence[PromptRecord], batch_size: BatchSize) -> Iterator[list[PromptRecord]]:
    """The records in their order, those together that may share a batch."""
    for group, same in groupby(records, lambda record: record.group):
        several, size = [*same], size_of(batch_size, group)
        yield from (several[start : start + size] for start in range(0, len(several), size))


def shapes(records: Sequence[PromptRecord], batch_size: BatchSize) -> list[ShapeKey]:
    """The shapes that `generate` runs, in its order."""
    return [_key(part) for part in batches(records, batch_size)]


def made(
    engine: Engine, records: Sequence[PromptRecord], batch_size: BatchSize, step_cache: StepCache
) -> Iterator[tuple[Sequence[PromptRecord], Images]]:
    """The records' images, batch by batch."""
    for index, part in enumerate(batches(records, batch_size)):
        steps = part[0].num_inference_steps
        batch = Batch(index, _key(part), steps, part, step_cache.mask(steps), part[0].adapters)
        yield part, engine.submit(batch).result()


def generate(
    engine: Engine,
    records: Sequence[PromptRecord],
    batch_size: BatchSize,
    step_cache: StepCache,
    output: Path,
    format: ImageFormat,
    model: str,
) -> Iterator[tuple[PromptRecord, Path | Failure]]:
    """Makes and writes each record's image, never over an existing file. One that cannot be made or encoded is a
    failure, and costs the others nothing. Signals are held while an image is written and told.

    Raises:
        JobError: the disk cannot be written.
        Stopped: a signal came.
    """
    for part, result in made(engine, records, batch_size, step_cache):
        for slot, record in enumerate(part):
            with signals.held():
                yield record, _save(result, slot, record, output, format, model)
            signals.check()


def _save(
    result: Images, slot: int, record: PromptRecord, output: Path, format: ImageFormat, model: str
) -> Path | Failure:
    if not result.finite[slot]:
        return Failure.of(record, "non_finite", "the model's output is not finite")
    try:
        data = images.encode(result.pixels[slot], format, record, model)
    except Exception as error:
        return Failure.of(record, "encode_error", first_line(error))
    return _write(data, output, record, format)


def _key(part: Sequence[PromptRecord]) -> ShapeKey:
    return part[0].group.shape(len(part))


def check_output(output: Path, count: int) -> str | None:
    """The format that `output` asks for by its suffix; None where it is a directory.

    Raises:
        UsageError, JobError: what could not be written in the end, told before any work.
    """
    suffix = output.suffix.lower()
    if output.is_dir() or suffix not in _SUFFIXES:
        return None
    name = _SUFFIXES[suffix]
    if name is None:
        raise UsageError(f"-o {output}: fluxcli writes .png, .jpg and .webp, not {suffix}")
    if count > 1:
        raise UsageError(f"-o {output}: {count} images need a directory, not a file name")
    if output.exists():
        raise JobError(f"-o {output}: exists already; fluxcli overwrites nothing")
    return name


def _write(data: bytes, output: Path, record: PromptRecord, format: ImageFormat) -> Path:
    """Takes a free name, then puts the whole image there at once. Leaves nothing where that fails."""
    try:
        path = _reserve(output, record, format)
        try:
            with replacing(path) as file:
                file.write(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise JobError(f"-o {output}: cannot be written: {error.strerror}") from error
    return path


def _reserve(output: Path, record: PromptRecord, format: ImageFormat) -> Path:
    if output.suffix.lower() in _SUFFIXES and not output.is_dir():
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch(exist_ok=False)
        return output
    output.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", record.prompt.lower()).strip("-")[:_SLUG].strip("-") or "image"
    number = 1
    while True:
        again = f"-{number}" if number > 1 else ""
        path = output / f"{slug}-{record.seed}{again}{format.suffix}"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1
