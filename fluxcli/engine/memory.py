"""What a job needs of the GPU's memory and what there is: decided before anything is loaded, so that what cannot fit is
said at once. On a CPU the weights alone are compared with the memory that is free.

Weights are counted. The rest is estimated from the tensors that are alive at once, a little generously: the runner
halves a batch that does not fit after all.

    denoise    the captured graph's buffers, kept for the whole job: `_TOKEN` values as wide as the model per token,
               those of both branches with true CFG; and the modulations of the steps that are made at once
    step cache what the blocks added: two values as wide as the model per image token of the largest shape
    encode     T5's activations, kept by its graph: `_TEXT` values as wide as its MLP per token, and attention scores
    decode     the VAE's activations: `_PIXEL` bytes for each pixel decoded at once

The constants are a little above what an H200 showed. A stage gives its memory back to the next; only the graphs and the
weights stay. T5, 9.5 of FLUX.1's 33.7 GB in
bfloat16, can stay on the host and visit the GPU block by block (`streaming`): the whole of it coming and going
would gain nothing, for it would need the same room at each batch. Images are decoded one by one at the least
(`vae.chunk_size`); tiles, which would change pixels at their seams, are not made.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import OutOfMemory
from fluxcli.core.records import Group, ShapeKey
from fluxcli.engine.nets.flux1 import FluxConfig
from fluxcli.engine.runtime.device import DTYPES
from fluxcli.engine.step_cache import BUFFERS
from fluxcli.engine.text import TEXT_BATCH
from fluxcli.engine.vae import chunk_size
from fluxcli.engine.weights.fill import size
from fluxcli.models.checkpoints import Checkpoint
from fluxcli.models.files import read_json

# Rows (steps x images) of modulations made at once: about 1 GB at FLUX.1's size, and all 28 steps of 16 images.
MODULATION_ROWS = 512
_TOKEN = 14  # 11.7 between batches of 8 and 16 at 1024x1024
_TEXT = 4
_PIXEL = 800  # per byte of the dtype; 768 at 1024x1024 and at 2048x2048
MOST_IMAGES = 16  # larger batches gain nothing more at 1024x1024
_CONTEXT = 2**30  # the embeddings kept, libraries' workspaces, the allocator's rounding


@dataclass(frozen=True)
class MemoryPlan:
    """Where things are while a job runs. `needed` bytes of the `available` ones; both 0 where nothing is planned."""

    visiting_text: bool = False
    needed: int = 0
    available: int = 0

    @property
    def spare(self) -> int:
        """Bytes that nothing else will need."""
        return max(0, self.available - self.needed)


class Needs:
    """Bytes that one checkpoint needs in one dtype, with the denoiser's blocks in 8 bits where `fp8`, and with what a
    `step_cache` keeps."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, fp8: bool = False, step_cache: bool = False) -> None:
        self._kept = BUFFERS if step_cache else 0
        parts = ("transformer", "text_encoder", "text_encoder_2", "vae")
        self._weights = {part: size(checkpoint, part, dtype, fp8) for part in parts}
        self._flux = FluxConfig.from_json(checkpoint.transformer)
        self._t5 = read_json(checkpoint.directory / "text_encoder_2" / "config.json")
        self._width = torch.empty((), dtype=dtype, device="meta").element_size()

    def weights(self, visiting_text: bool) -> int:
        blocks = self._weights["text_encoder_2"] - self._t5["vocab_size"] * self._t5["d_model"] * self._width
        away = blocks - blocks // self._t5["num_layers"]
        return sum(self._weights.values()) - (away if visiting_text else 0)

    def shapes(self, keys: Sequence[ShapeKey]) -> int:
        """Beside the weights, for a job of all these shapes. The graphs share the memory of the largest; each smaller
        one runs outside it once, before it is captured."""
        graphs = sorted((self._graph(key) for key in keys), reverse=True)
        text = max(self._encode(key.text_length) for key in keys)
        added = self._kept * max(key._replace(text_length=0).tokens() for key in keys)
        return text + graphs[0] + max([*graphs[1:], *map(self._passing, keys)]) + self._wide(added) + _CONTEXT

    def _graph(self, key: ShapeKey) -> int:
        return self._wide(_TOKEN * key.tokens())

    def _wide(self, values: int) -> int:
        """Bytes of so many values as wide as the model."""
        return values * self._flux.inner_dim * self._width

    def _passing(self, key: ShapeKey) -> int:
        modulations = MODULATION_ROWS * self._flux.modulations * self._flux.inner_dim * self._width
        pixels = key.height * key.width
        decode = chunk_size(key.batch_size, pixels) * pixels * _PIXEL * self._width
        return max(modulations, self._encode(key.text_length), decode)

    def _encode(self, text_length: int) -> int:
        tokens = TEXT_BATCH * text_length
        scores = tokens * text_length * self._t5["num_heads"] * (4 + self._width)
        return tokens * self._t5["d_ff"] * _TEXT * self._width + scores


def plan(
    checkpoint: Checkpoint, config: EngineConfig, shapes: Sequence[ShapeKey], available: int | None = None
) -> MemoryPlan:
    """Where T5 is to live while `shapes` run.

    Args:
        available: bytes; None for what this process may still take of the device.

    Raises:
        OutOfMemory: one image of the largest shape does not fit, wherever T5 lives; on a CPU, the weights do not.
    """
    if not config.device.startswith("cuda"):
        return _on_host(checkpoint, config, host_free() if available is None else available)
    if not shapes:
        return MemoryPlan()
    needs = Needs(checkpoint, DTYPES[config.dtype], config.fp8, config.step_cache)
    there = free(config.device) if available is None else available
    wanted, least = needs.shapes(shapes), needs.shapes([key._replace(batch_size=1) for key in shapes])
    for visiting in (False, True):
        if needs.weights(visiting) + wanted <= there:
            return MemoryPlan(visiting, needs.weights(visiting) + wanted, there)
    needed = needs.weights(visiting_text=True) + least
    if needed <= there:
        return MemoryPlan(True, needed, there)
    largest = max(shapes, key=lambda key: (key.height * key.width, key.text_length))
    numbers = "fp8" if config.fp8 else config.dtype
    raise OutOfMemory(
        f"--model {checkpoint.name} does not fit: one image of {largest.width}x{largest.height} with "
        f"{largest.text_length} text tokens needs {_gb(needed)} in {numbers}, T5 on the host, and {_gb(there)} of "
        f"{config.device} are free; use a GPU with more memory or smaller images"
    )


def _on_host(checkpoint: Checkpoint, config: EngineConfig, there: int | None) -> MemoryPlan:
    if there is None:
        return MemoryPlan()
    needed = Needs(checkpoint, DTYPES[config.dtype], config.fp8).weights(visiting_text=False)
    if needed <= there:
        return MemoryPlan(False, needed, there)
    half = config.dtype == "float32" and needed // 2 <= there
    raise OutOfMemory(
        f"--model {checkpoint.name} does not fit: its weights take {_gb(needed)} in {config.dtype}, and {_gb(there)} "
        f"of this machine's memory are free; use {'--dtype bfloat16, ' if half else ''}a GPU or a larger machine"
    )


class LargestBatch:
    """Group -> the largest power of two, up to `MOST_IMAGES`, of images that fit: `--batch-size auto`."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self._needs = None
        if config.device.startswith("cuda"):
            self._needs = Needs(checkpoint, DTYPES[config.dtype], config.fp8, config.step_cache)
            self._free = free(config.device)

    def __call__(self, group: Group) -> int:
        if self._needs is None:
            return MOST_IMAGES
        # A T5 that only visits costs more than batches gain, so it stays wherever one image fits beside it.
        for visiting in (False, True):
            size = MOST_IMAGES
            while size:
                if self._needs.weights(visiting) + self._needs.shapes([group.shape(size)]) <= self._free:
                    return size
                size //= 2
        return 1  # the engine will refuse it and say why


def free(device: str) -> int:
    """Bytes that this process may still take of a GPU: what is free, within the share that torch allows it
    (`torch.cuda.set_per_process_memory_fraction`)."""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device)) - held
    # What is held but not in use is free for us.
    return min(free, share) + held - torch.cuda.memory_allocated(device)


def host_free(root: Path = Path("/")) -> int | None:
    """Bytes that a process may still take of this machine's memory and swap, within its control group where that has a
    limit; None where Linux does not tell."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    told = {name: 1024 * int(rest.split()[0]) for name, rest in (line.split(":") for line in text.splitlines())}
    there = told["MemAvailable"] + told["SwapFree"]
    with suppress(OSError, ValueError):  # no group, or one that says "max"
        group = root / "sys/fs/cgroup"
        limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        there = min(there, limit - used + int(stat["inactive_file"]))  # files' pages can be dropped
    return there


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
