"""fluxcli from Python: a model that makes images, and the job that `fluxcli batch` runs. Names and defaults are the
command line's; here a model is always named."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fluxcli.core import config
from fluxcli.core.errors import FluxcliError, RowError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxcli.core.config import EngineConfig
    from fluxcli.core.records import ShapeKey
    from fluxcli.core.step_cache import StepCache
    from fluxcli.engine.engine import Engine
    from fluxcli.models.checkpoints import Checkpoint
    from fluxcli.models.tokenizers import Tokenizers
    from fluxcli.worker import Processes

Lora = str | os.PathLike[str] | dict[str, Any] | Sequence[str | os.PathLike[str] | dict[str, Any]]

__all__ = ["FluxcliError", "Job", "Model", "load"]


def load(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    device: str = "auto",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    compile: bool | None = None,
    attention: str = "auto",
    quantization: Literal["none", "fp8"] = "none",
    text_lengths: Sequence[int] = config.TEXT_LENGTHS,
    step_cache: str = "off",
) -> "Model":
    """Loads a model: a hub id, a pipeline directory, a single file, `tiny`, or `random:flux-dev`.

    Args:
        files: single files in place of the weights of "transformer", "vae", "text_encoder" (CLIP) or "text_encoder_2"
            (T5).
        device: "cuda", "cuda:N", "cpu", or "auto" for the GPU where there is one.
        compile: prepare each shape at its first use; None does on a GPU.
        quantization: "fp8" for the large matmuls in 8 bits.
        text_lengths: buckets of prompt length in T5 tokens; (512,) is the reference setting.
        step_cache: as --step-cache.

    Raises:
        FluxcliError: no such model or device, or it does not fit.
    """
    from fluxcli.engine.engine import Engine

    lengths = _buckets(text_lengths)
    machine = (device, dtype, compile, attention, quantization, step_cache)
    checkpoint, engine, cache = _settled(model, revision, files, *machine)
    return Model(checkpoint, Engine(checkpoint, engine), lengths, cache)


class Model:
    """A model on its device. Not thread-safe: one call after the other."""

    def __init__(
        self, checkpoint: "Checkpoint", engine: "Engine", text_lengths: tuple[int, ...], step_cache: "StepCache"
    ) -> None:
        self.name = checkpoint.name
        self._checkpoint, self._engine, self._text_lengths = checkpoint, engine, text_lengths
        self._step_cache = step_cache

    def generate(
        self,
        prompt: str,
        *,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float = 1.0,
        seed: int = 0,
        n: int = 1,
        lora: "Lora" = (),
        batch_size: int = config.BATCH_SIZE,
    ) -> "list[Image]":
        """Makes `n` images of one prompt, of the seeds `seed`, `seed + 1`, …: those that `fluxcli gen` writes.

        Args:
            width, height: pixels, multiples of 16 from 64 to 4096. None is the model's own, as for steps and guidance.
            lora: a path, or paths and {"path": ..., "scale": ...}, as a row's.
            negative_prompt: with a `true_cfg_scale` above 1, what to guide away from; it may be empty.
            batch_size: images made at once.

        Raises:
            FluxcliError: an argument that cannot be meant, memory that does not suffice, or output that is not finite.
        """
        from PIL import Image

        from fluxcli.job import single

        _between("batch_size", batch_size, config.MOST_IMAGES)
        self._checkpoint.adapters.refresh()
        given: dict[str, Any] = {"width": width, "height": height, "steps": steps, "guidance": guidance, "seed": seed}
        given |= {"negative_prompt": negative_prompt, "true_cfg_scale": true_cfg_scale, "lora": lora}
        defaults = _row_defaults(self._checkpoint, given, self._step_cache)
        records = single.requested([prompt], seed, n, defaults, self._tokenizers, self._text_lengths)
        images = []
        for part, result in single.made(self._engine, records, batch_size, defaults.step_cache):
            for record, finite, pixels in zip(part, result.finite, result.pixels, strict=True):
                if not finite:
                    raise FluxcliError(f"seed {record.seed}: the model's output is not finite")
                images.append(Image.fromarray(pixels))
        return images

    @cached_property
    def _tokenizers(self) -> "Tokenizers":
        from fluxcli.models.tokenizers import Tokenizers

        return Tokenizers(self._checkpoint.tokenizers)


@dataclass(frozen=True)
class Job:
    """A job: every row of `input` (.jsonl, .txt, .csv, .tsv) becomes an image in the directory `output`.

    What the fields mean is what `fluxcli batch --help` says of the options of their names.
    """

    input: str | os.PathLike[str]
    output: str | os.PathLike[str]
    model: str | os.PathLike[str]
    revision: str | None = None
    files: Mapping[str, str | os.PathLike[str]] | None = None
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    compile: bool | None = None
    attention: str = "auto"
    quantization: Literal["none", "fp8"] = "none"
    step_cache: str = "off"
    text_lengths: Sequence[int] = config.TEXT_LENGTHS
    batch_size: int = config.BATCH_SIZE
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    seed: int = 0
    num_images: int = 1
    lora: "Lora" = ()
    format: Literal["png", "jpg", "webp"] = "png"
    quality: int = 95
    limit: int | None = None
    strict: bool = False
    max_failures: int | None = None
    retry_failed: bool = True
    append: bool = False
    gpus: "Literal['all'] | int | Sequence[int] | None" = None
    workers: int | None = None
    ray: str | None = None

    def run(self, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
        """Does what is missing, and returns what `fluxcli batch --json` prints.

        `exit_status` in it is 0 where every row has its image, 3 where some failed, and 130 or 143 where a signal came
        while images were made.

        Args:
            say: given each line that the command would print; progress goes to stderr.

        Raises:
            FluxcliError: nothing more can be done; what was committed stays.
        """
        from fluxcli import worker

        _one_of("format", self.format, config.FORMATS)
        _between("quality", self.quality, 100)
        _between("batch_size", self.batch_size, config.MOST_IMAGES)
        _between("num_images", self.num_images, config.MOST_IMAGES_OF_ROW)
        if self.workers is not None:
            _between("workers", self.workers, config.MOST_WORKERS)
        several = worker.processes(_gpus(self.gpus), self.workers, self.ray, self.device)
        with closing(several) if several is not None else nullcontext():
            return self._run(several, say)

    def _run(self, several: "Processes | None", say: Callable[[str], None]) -> dict[str, Any]:
        from fluxcli.engine.engine import Engine
        from fluxcli.engine.runtime import device as devices
        from fluxcli.job import job

        device = self.device if several is None else several.device
        machine = (device, self.dtype, self.compile, self.attention, self.quantization, self.step_cache)
        elsewhere = several is not None and several.elsewhere
        checkpoint, engine, cache = _settled(self.model, self.revision, self.files, *machine, elsewhere)
        if "://" in os.fspath(self.output):
            raise UsageError(f"output {self.output} is an address; fluxcli writes files of this machine only")
        made = job.Job(
            os.fspath(self.input),
            Path(self.output),
            checkpoint,
            engine,
            replace(
                _row_defaults(checkpoint, {name: getattr(self, name) for name in _OF_ROWS}, cache),
                num_images=self.num_images,
            ),
            text_lengths=_buckets(self.text_lengths),
            image=config.ImageFormat(self.format, self.quality),
            batch_size=self.batch_size,
            limit=self.limit,
            strict=self.strict,
            max_failures=self.max_failures,
            retry_failed=self.retry_failed,
            append=self.append,
        )

        def own(shapes: "Sequence[ShapeKey]") -> Engine:
            return Engine(checkpoint, engine, shapes)

        engines = own if several is None else several.workers(checkpoint, engine)
        status, totals = made.run(engines, devices.machine(engine), say)
        return {"directory": str(made.directory), **totals, "exit_status": status}


def _settled(
    model: str | os.PathLike[str],
    revision: str | None,
    files: Mapping[str, str | os.PathLike[str]] | None,
    device: str,
    dtype: str,
    compile: bool | None,
    attention: str,
    quantization: str,
    step_cache: str,
    elsewhere: bool = False,
) -> "tuple[Checkpoint, EngineConfig, StepCache]":
    from fluxcli.engine.runtime import device as devices
    from fluxcli.models import checkpoints
    from fluxcli.models.step_cache import parse, settled

    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise UsageError(f"device must be auto, cuda, cuda:N or cpu, got {device!r}")
    _one_of("dtype", dtype, ("auto", *config.DTYPES))
    _one_of("attention", attention, ("auto", *config.ATTENTION))
    _one_of("quantization", quantization, config.QUANTIZATION)
    for part in files or ():
        _one_of("files", part, checkpoints.FILE_PARTS)
    wanted, engine = parse(step_cache), devices.resolve(device, dtype, compile, attention, quantization, elsewhere)
    checkpoint = checkpoints.resolve(os.fspath(model), revision, files)
    return checkpoint, replace(engine, step_cache=wanted.on), settled(wanted, checkpoint)


_OF_ROWS = ("width", "height", "steps", "guidance", "negative_prompt", "true_cfg_scale", "seed", "lora")


def _row_defaults(checkpoint: "Checkpoint", given: Mapping[str, Any], step_cache: "StepCache") -> config.RowDefaults:
    """Settings by the names of `_OF_ROWS`, checked as a row's are."""
    from fluxcli.job.input.check import MAX_SEED, check_row

    seed = given["seed"]
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise UsageError(f"seed must be 0 to {MAX_SEED}, got {seed!r}")
    lora = given["lora"]
    several = [lora] if isinstance(lora, str | os.PathLike | dict) else lora
    given = {**given, "lora": [os.fspath(each) if isinstance(each, os.PathLike) else each for each in several]}
    try:
        own = replace(checkpoint.row_defaults(), step_cache=step_cache)
        (row,) = check_row({"prompt": "any", **given}, 0, 1, own)
    except RowError as error:
        raise UsageError(str(error)) from error
    taken = row.guidance_scale if checkpoint.takes_guidance else None
    sizes = (row.width, row.height, row.num_inference_steps)
    scale = max(1.0, float(given["true_cfg_scale"]))  # of rows that have a negative prompt of their own
    own = replace(own, adapters=row.adapters, negative_prompt=row.negative_prompt, true_cfg_scale=scale)
    width, height, steps = sizes
    return replace(own, width=width, height=height, num_inference_steps=steps, guidance_scale=taken, seed=row.seed)


def _buckets(text_lengths: Sequence[int]) -> tuple[int, ...]:
    for length in text_lengths:
        _between("text_lengths", length, config.MAX_TEXT_LENGTH)
    return tuple(sorted(set(text_lengths)))


def _gpus(gpus: "str | int | Sequence[int] | None") -> "str | int | Sequence[int] | None":
    if gpus is None or gpus == "all":
        return gpus
    several = [gpus] if isinstance(gpus, int) else [*gpus]
    least = 1 if isinstance(gpus, int) else 0
    if not several or any(type(gpu) is not int or gpu < least for gpu in several) or len({*several}) < len(several):
        raise UsageError(f'gpus must be "all", a number from 1, or different GPUs like [0, 2], got {gpus!r}')
    return gpus if isinstance(gpus, int) else several


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _between(name: str, value: int, most: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= most:
        raise UsageError(f"{name} must be 1 to {most}, got {value!r}")
