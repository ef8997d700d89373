"""Frozen settings of a run, complete before anything starts. "auto" is resolved before these are made."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fluxcli.core.errors import ModelError
from fluxcli.core.records import Adapter, Adapters
from fluxcli.core.step_cache import OFF, StepCache

TEXT_LENGTHS = (64, 128, 256, 512)
MAX_TEXT_LENGTH = 512  # what FluxPipeline accepts as max_sequence_length
BATCH_SIZE = 8
MOST_IMAGES = 1024  # in a batch
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZATION = ("none", "fp8")
ATTENTION = ("cudnn", "fa4", "fa3", "fa2", "sdpa")
MOST_WORKERS = 256  # processes of a job
MOST_IMAGES_OF_ROW = 10_000
MAX_STEPS = 1000  # denoising steps that a row may ask for
FORMATS = ("png", "jpg", "webp")


def _no_adapter(path: str, scale: float) -> Adapter:
    raise ModelError(f"{path}: no model to hold it against")


@dataclass(frozen=True)
class RowDefaults:
    """What an input row gets where it says nothing, and the step cache, which a row has no say in. `num_images` is how
    many a row becomes. `guidance_scale` is None where the model takes none. There is true CFG where there is a negative
    prompt and a scale above 1. `adapter` looks a file up, by path and scale, that a row names; ModelError where the
    model cannot take it."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float | None
    seed: int = 0
    step_cache: StepCache = OFF
    adapters: Adapters = ()
    adapter: Callable[[str, float], Adapter] = field(default=_no_adapter, compare=False)
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    num_images: int = 1


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. `device` is "cpu" or "cuda:N", or "cuda" for a GPU of another machine; `dtype` a torch
    dtype's name; `compile` whether each shape is prepared ahead, as captured graphs on CUDA and by torch.compile on a
    CPU; `attention` may be "auto", which the engine settles by measuring at warm-up; `quantization` is one of
    `QUANTIZATION`; `step_cache` whether batches may have masks."""

    device: str
    dtype: str
    compile: bool
    attention: str = "auto"
    quantization: str = "none"
    step_cache: bool = False

    @property
    def fp8(self) -> bool:
        """Whether the large matmuls of the blocks are in 8 bits."""
        return self.quantization == "fp8"

    @property
    def pads_batches(self) -> bool:
        """Whether batches are padded to fixed sizes: captured graphs need it, elsewhere it would be waste."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class ImageFormat:
    """How images are written. `quality` is 1..100 and ignored by PNG, which is lossless."""

    name: str = "png"
    quality: int = 95

    @property
    def lossless(self) -> bool:
        return self.name == "png"

    @property
    def suffix(self) -> str:
        return f".{self.name}"
