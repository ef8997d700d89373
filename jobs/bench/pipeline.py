"""Images an hour by diffusers' own pipeline as its makers advise to run it: blocks and VAE decoder compiled, cuDNN
attention on a GPU, prompts padded to 512 tokens. One batch of prompts, after one of a single step that compiles; prints
one JSON object.

    python -m jobs.bench.pipeline DIRECTORY prompts.tsv --batch-size 16 --steps 28
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fluxcli.core.config import RowDefaults
from fluxcli.job.input.check import check_row
from fluxcli.job.input.read import PromptFile


def prompts(path: Path, count: int) -> list[str]:
    defaults = RowDefaults(1024, 1024, 28, 3.5)
    found = []
    for raw in PromptFile(str(path)).scan():
        found += [record.prompt for record in check_row(raw.value, raw.number, raw.line, defaults)]
        if len(found) >= count:
            return found[:count]
    raise SystemExit(f"{path}: has {len(found)} prompts, {count} are needed")


def load(directory: Path, compiled: bool) -> Any:
    from diffusers import FluxPipeline

    cuda = torch.cuda.is_available()
    pipe = FluxPipeline.from_pretrained(directory, dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.to("cuda" if cuda else "cpu")
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_slicing()  # a whole batch of large pictures would not fit
    if cuda:
        pipe.transformer.set_attention_backend("_native_cudnn")
        pipe.vae.to(memory_format=torch.channels_last)
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        pipe.vae.decoder.compile(fullgraph=True, dynamic=False)
    return pipe


def batch(pipe: Any, texts: list[str], steps: int, size: int, out: Path) -> float:
    """Seconds from prompts to PNG files."""
    start = time.perf_counter()
    generators = [torch.Generator("cpu").manual_seed(number) for number in range(len(texts))]
    images = pipe(
        texts, num_inference_steps=steps, width=size, height=size, generator=generators, max_sequence_length=512
    ).images
    for number, image in enumerate(images):
        image.save(out / f"{number}.png", compress_level=1)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, default=1024, help="pixels along a side")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    texts = prompts(args.prompts, args.batch_size)
    pipe = load(args.directory, args.compile)
    with tempfile.TemporaryDirectory() as out:
        first = batch(pipe, texts, 1, args.size, Path(out))
        seconds = batch(pipe, texts, args.steps, args.size, Path(out))
    import diffusers

    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
                **{name: getattr(args, name) for name in ("batch_size", "steps", "size", "compile")},
                "first_batch_s": first,
                "seconds": seconds,
                "images_per_hour": 3600 * args.batch_size / seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
