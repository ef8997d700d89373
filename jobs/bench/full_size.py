"""Writes a FLUX.1 pipeline of full size with random weights: 34 GB of files to time loading, starting and whole jobs
on, where the real ones cannot be had.

    python -m jobs.bench.full_size DIRECTORY --tokenizers path/to/FLUX.1-dev

`--tokenizers` names a pipeline directory with FLUX.1's own; without it the built-in model's are used.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from fluxcli.models.checkpoints import BUILT_IN
from fluxcli.models.files import read_json

SHARD = 5_000_000_000  # bytes, and the memory this takes
BLOCK = 2**23  # random numbers that are drawn; a matrix is as many copies of them as it needs
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--like", type=Path, default=BUILT_IN / "flux-dev", help="whose configs to follow")
    parser.add_argument("--tokenizers", type=Path, default=BUILT_IN / "tiny")
    args = parser.parse_args()
    print(f"{write(args.directory, args.like, args.tokenizers) / 1e9:.1f} GB in {args.directory}")


def write(directory: Path, like: Path, tokenizers: Path, shard: int = SHARD) -> int:
    """Returns the bytes of the weights, bfloat16. `directory` must not exist."""
    weights = shutil.ignore_patterns("*.safetensors*", "tokenizer*")
    shutil.copytree(like, directory, ignore=weights)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / part, directory / part)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    total = 0
    for part, (library, name) in parts(like):
        cls, config = getattr({"diffusers": diffusers, "transformers": transformers}[library], name), like / part
        with torch.device("meta"):
            given = read_json(config / "config.json")
            model = cls.from_config(given) if library == "diffusers" else cls(cls.config_class.from_dict(given))
        slots = list(model.named_parameters())  # tied tensors once
        total += 2 * sum(slot.numel() for _, slot in slots)
        save(shards(slots, shard), directory / part, STEMS[library], block)
    return total


def parts(directory: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """The parts that have weights, with the library and class of each."""
    index = read_json(directory / "model_index.json")
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        library, name = index[part]
        yield part, (library, name)


def shards(slots: list[tuple[str, Tensor]], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in files of at most `limit` bytes each, one tensor at the least."""
    found: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, slot in slots:
        nbytes = 2 * slot.numel()
        if found[-1] and size + nbytes > limit:
            found.append({})
            size = 0
        found[-1][name] = slot
        size += nbytes
    return found


def save(files: list[dict[str, Tensor]], directory: Path, stem: str, block: Tensor) -> None:
    names = [f"{stem}.safetensors"]
    if len(files) > 1:
        names = [f"{stem}-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        placed = {name: file for file, slots in zip(names, files, strict=True) for name in slots}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    for file, slots in zip(names, files, strict=True):
        values = {name: drawn(name, slot.shape, block) for name, slot in slots.items()}
        save_file(values, directory / file, metadata={"format": "pt"})


def drawn(name: str, shape: torch.Size, block: Tensor) -> Tensor:
    """Values that keep activations finite: matrices with the variance of their fan-in, norm weights of one, no bias."""
    if len(shape) < 2:
        return torch.zeros(shape, dtype=torch.bfloat16) if name.endswith("bias") else torch.ones(shape).bfloat16()
    count = math.prod(shape)
    scaled = (block * math.prod(shape[1:]) ** -0.5).bfloat16()
    return scaled.repeat(-(-count // len(block)))[:count].view(shape).contiguous()


if __name__ == "__main__":
    main()
