"""The frozen records that flow through fluxcli, below everything else: row -> batch -> images -> manifest row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fluxcli.core.family import TOKEN_SIDE

if TYPE_CHECKING:
    import numpy as np


class ShapeKey(NamedTuple):
    """What fixes every tensor shape of a denoising step: the key for planning, compiling, capturing and benchmarking.

    `batch_size` is the images that run, padding included. Sizes are in pixels; `text_length` in T5 tokens. `branches`
    are rows of the denoiser for each image: 2 with true CFG, which has one for the negative prompt.
    """

    batch_size: int
    height: int
    width: int
    text_length: int
    branches: int = 1

    def tokens(self) -> int:
        """Text and image tokens of the whole batch: how large the shape is."""
        return self.rows * (self.height * self.width // TOKEN_SIDE**2 + self.text_length)

    @property
    def rows(self) -> int:
        """Of the denoiser."""
        return self.batch_size * self.branches

    def told(self) -> dict[str, int]:
        """As data: `branches` only where there are two."""
        return {name: value for name, value in self._asdict().items() if name != "branches" or value > 1}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "ShapeKey":
        """From such data, or more."""
        return cls(**{name: told[name] for name in cls._fields if name in told})

    def __str__(self) -> str:
        guided = ", true CFG" if self.branches > 1 else ""
        return f"{self.batch_size} x {self.width}x{self.height}, text {self.text_length}{guided}"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA file as an image uses it: `path` as it was given, its SHA-256, and what its difference is multiplied by.
    Two are one where hash and scale are, wherever they lie."""

    path: str = field(compare=False)
    sha256: str
    scale: float

    def as_row(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256, "scale": self.scale}


Adapters = tuple[Adapter, ...]  # what an image is made with; none is the model as it is


class Group(NamedTuple):
    """Rows of one group may share a batch: one shape, one number of steps, one set of adapters."""

    height: int
    width: int
    text_length: int
    num_inference_steps: int
    branches: int = 1
    adapters: Adapters = ()

    def shape(self, batch_size: int) -> ShapeKey:
        return ShapeKey(batch_size, self.height, self.width, self.text_length, self.branches)


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One image to make: an input row, checked, with every default filled in.

    `guidance_scale` is None where the model takes none. `line` counts from 1 in the input. `text_tokens` is the
    prompt's full T5 length, or the negative prompt's if that is longer; `text_length` the bucket both are padded (or,
    if `truncated`, cut) to. `negative_prompt` is None, and `true_cfg_scale` 1, without true CFG. `row` is the input's
    row without id, seed and number of images.
    """

    id: str
    prompt: str
    seed: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float | None
    line: int
    meta: dict[str, Any] = field(default_factory=dict)
    text_tokens: int = 0
    text_length: int = 0
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    adapters: Adapters = ()
    row: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def branches(self) -> int:
        """Rows of the denoiser that it takes."""
        return 1 if self.negative_prompt is None else 2

    @property
    def truncated(self) -> bool:
        return self.text_tokens > self.text_length

    @property
    def group(self) -> Group:
        steps = self.num_inference_steps
        return Group(self.height, self.width, self.text_length, steps, self.branches, self.adapters)


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that run together at `key`, all with the same `adapters`; there may be fewer of them than
    `key.batch_size`. `mask` has a 1 for each step that evaluates the blocks and a 0 for each other; nothing where all
    do."""

    index: int
    key: ShapeKey
    num_inference_steps: int
    records: Sequence[PromptRecord]
    mask: str = ""
    adapters: Adapters = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """One image's share of its batch, in seconds: the device's own clock for device stages, the host's for saving."""

    encode_s: float
    denoise_s: float
    decode_s: float
    save_s: float = 0.0

    def as_row(self) -> dict[str, float]:
        parts = {
            "encode_s": self.encode_s,
            "denoise_s": self.denoise_s,
            "decode_s": self.decode_s,
            "save_s": self.save_s,
        }
        rounded = {name: round(seconds, 6) for name, seconds in parts.items()}
        return {**rounded, "total_s": round(sum(rounded.values()), 6)}


@dataclass(frozen=True, slots=True)
class Images:
    """What became of a batch: pixels uint8 [n, H, W, 3] on the host; whether each image's latents were finite; and each
    image's share of the batch's device time."""

    pixels: "np.ndarray[Any, Any]"
    finite: list[bool]
    timing: Timing


@dataclass(frozen=True, slots=True)
class WarmUp:
    """One shape made ready: seconds it took, functions traced and kernels made ready for it, how many of those no cache
    held, and its attention."""

    key: ShapeKey
    seconds: float
    graphs: int
    misses: int
    attention: str

    @property
    def state(self) -> str:
        if not self.graphs:
            return "nothing to compile"
        return "cold" if self.misses else "cached"


@dataclass(frozen=True, slots=True)
class Failure:
    """One row of failures.jsonl, before the store numbers its attempt and run. `row` is what to give for it again; `at`
    where the input has it, as (offset, digest)."""

    id: str | None
    line: int
    kind: str
    message: str
    row: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    at: tuple[int, int] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, record: PromptRecord, kind: str, message: str) -> "Failure":
        """Of an image that was tried: its row asks for this one image, of the same seed."""
        return cls(record.id, record.line, kind, message, {"id": record.id, **record.row, "seed": record.seed})

    def as_row(self) -> dict[str, Any]:
        error = {"type": self.kind, "message": self.message}
        return {"id": self.id, "line": self.line, "error": error, "row": self.row}
