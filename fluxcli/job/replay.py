"""`fluxcli replay`: one image of a job drawn again from its manifest row, and held to the file that is there."""

import hashlib
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxcli.core.config import DTYPES, FORMATS, MAX_STEPS, MAX_TEXT_LENGTH, QUANTIZATION, ImageFormat
from fluxcli.core.errors import JobError, ModelError
from fluxcli.core.records import Adapters, Batch, PromptRecord, ShapeKey
from fluxcli.core.terminal import printable_line
from fluxcli.job.output import images, sound
from fluxcli.job.output.identity import Identity, read_identity
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.output.sink import FileSink
from fluxcli.job.report import mend
from fluxcli.job.report.distance import psnr
from fluxcli.job.report.verify import require_job
from fluxcli.job.run.lanes import Engine
from fluxcli.models.adapters.catalog import Catalog
from fluxcli.models.checkpoints import Checkpoint
from fluxcli.models.flux1.family import FLUX1


@dataclass(frozen=True)
class Made:
    """What a job says of one of its images: the row, and the settings of all its rows."""

    directory: Path
    identity: Identity
    row: ManifestRow

    @property
    def model(self) -> str:
        return str(self.identity.model["name"])

    @property
    def revision(self) -> str | None:
        return self.identity.model.get("revision")

    @property
    def dtype(self) -> str:
        dtype = self.identity.options.get("dtype")
        if dtype not in DTYPES:
            raise JobError(f"{self.directory / 'job.json'}: options.dtype is none of {', '.join(DTYPES)}")
        return str(dtype)

    @property
    def quantization(self) -> str:
        return self.row.quantization or "none"

    @property
    def format(self) -> ImageFormat:
        name, quality = self.identity.options.get("format"), self.identity.options.get("quality")
        if name not in FORMATS or not (quality is None or (isinstance(quality, int) and 1 <= quality <= 100)):
            raise JobError(f"{self.directory / 'job.json'}: names no format of images")
        return ImageFormat(name) if quality is None else ImageFormat(name, quality)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises ModelError where the model is another than the job's."""
        known = self.identity.model["fingerprint"]
        if checkpoint.fingerprint(known) != known:
            raise ModelError(
                f"--model {checkpoint.name}: is not what {self.directory} was made with (weights {known[:8]}); "
                "replay draws with the same weights only"
            )

    def record(self, catalog: Catalog) -> PromptRecord:
        """The row as the engine takes it.

        Raises:
            ModelError: an adapter that is gone, or another than it was.
        """
        row = self.row
        assert row.text_length is not None
        return PromptRecord(
            row.id, row.prompt, row.seed, row.width, row.height, row.num_inference_steps, row.guidance_scale, 1, {},
            row.text_tokens or 0, row.text_length, row.negative_prompt, row.true_cfg_scale or 1.0,
            _adapters(row.lora or [], catalog),
        )  # fmt: skip


def made(directory: Path, id: str) -> Made:
    """The newest row with this id.

    Raises:
        JobError: there is none, or no job.
    """
    require_job(directory)
    identity = read_identity(directory)
    if identity is None:
        raise JobError(f"{directory}: has no job.json, which says how its images were made")
    log, found, sought = RowLog(directory / "manifest.jsonl", ManifestRow), None, f'"{id}"'.encode()
    for _, line in log.lines():
        # An id is ASCII: of millions of rows only those that may be it are parsed.
        row = mend.row_of(ManifestRow, line) if sought in line else None
        if row is not None and row.id == id:
            found = row
    if found is None:
        raise JobError(f"{directory}: has no image with the id {printable_line(id)}")
    if wrong := _wrong(found):
        raise JobError(f"{log.path}: the row of {id} cannot be drawn again: {wrong}")
    return Made(directory, identity, found)


def _wrong(row: ManifestRow) -> str | None:
    """What fluxcli never writes, though a row may say it."""
    steps = row.num_inference_steps
    if row.text_length is None or not 1 <= row.text_length <= MAX_TEXT_LENGTH:
        return f"text_length must be 1 to {MAX_TEXT_LENGTH}"
    if not (FLUX1.draws(row.width) and FLUX1.draws(row.height)):
        return "width and height must be multiples of {} from {} to {}".format(FLUX1.token_side, *FLUX1.sides)
    if steps > MAX_STEPS:
        return f"num_inference_steps must be at most {MAX_STEPS}"
    if row.step_cache is not None and len(row.step_cache) != steps:
        return "step_cache is no mask of its steps"
    if row.quantization is not None and row.quantization not in QUANTIZATION:
        return f"quantization is none of {', '.join(QUANTIZATION)}"
    return None


def key_of(record: PromptRecord) -> ShapeKey:
    return record.group.shape(1)


def draw(engine: Engine, row: ManifestRow, record: PromptRecord) -> "np.ndarray[Any, Any]":
    """Pixels [H, W, 3], uint8.

    Raises:
        JobError: the model's output is not finite.
    """
    steps = record.num_inference_steps
    batch = Batch(0, key_of(record), steps, [record], row.step_cache or "", record.adapters)
    result = engine.submit(batch).result()
    if not result.finite[0]:
        raise JobError(f"{record.id}: the model's output is not finite")
    return np.asarray(result.pixels[0])


@dataclass(frozen=True)
class Verdict:
    """How a drawn image compares with the job's.

    Attributes:
        same: "bytes", "pixels", or "" where neither is the same.
        on_disk: whether the job's file is the one that its row was written for.
        grey_levels: the largest and the mean difference of pixels; None where the file cannot be read, and where the
            bytes are the same.
        psnr: in dB.
    """

    same: str
    on_disk: bool
    grey_levels: tuple[int, float] | None = None
    psnr: float | None = None


def compare(job: Made, data: bytes) -> Verdict:
    """Holds a drawn image's file to the row's hash, then its pixels to those of the job's file."""
    digest = hashlib.sha256(data).hexdigest()
    there = _file(job)
    on_disk = there is not None and hashlib.sha256(there).hexdigest() == job.row.sha256
    if digest == job.row.sha256:
        return Verdict("bytes", on_disk)
    if there is None:
        return Verdict("", False)
    try:
        before = sound.pixels_of(io.BytesIO(there))
    except sound.Unsound:
        return Verdict("", on_disk)
    now = sound.pixels_of(io.BytesIO(data))
    if before.shape != now.shape:
        return Verdict("", on_disk)
    off = np.abs(before.astype(np.int16) - now)
    distance = psnr(before, now)
    levels = int(off.max()), float(off.mean())
    return Verdict("" if off.any() else "pixels", on_disk, levels, None if math.isinf(distance) else distance)


def encoded(job: Made, pixels: "np.ndarray[Any, Any]", record: PromptRecord, label: str) -> bytes:
    return images.encode(pixels, job.format, record, label)


def _file(job: Made) -> bytes | None:
    """The job's image; None where it cannot be read."""
    sink = FileSink(job.directory, "")
    try:
        with os.fdopen(sink.open(job.row.file_name), "rb") as file:
            return file.read()
    except OSError:
        return None
    finally:
        sink.close()


def _adapters(told: list[Any], catalog: Catalog) -> Adapters:
    found = []
    for each in told:
        adapter = catalog.adapter(each["path"], float(each["scale"]))
        if adapter.sha256 != each["sha256"]:
            raise ModelError(f"{each['path']}: is another adapter than the image was made with; put that one back")
        found.append(adapter)
    return tuple(found)
