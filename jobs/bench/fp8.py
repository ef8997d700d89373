"""The price of numbers in 8 bits, on any machine: `python -m jobs.bench.fp8 products|latents|meaning`.

products   relative error of single matmuls of FLUX.1's widths, with outlier channels, for several ways to scale
latents    relative error of the latents after 28 steps, of a narrower and shallower FLUX with random weights
meaning    the built-in model's adherence over unseen prompts, with and without fp8 on the same seeds, by its judge
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluxcli import Job
from fluxcli.engine import denoise
from fluxcli.engine.attention.backends import sdpa
from fluxcli.engine.layers.rope import rope
from fluxcli.engine.matmul.gemm import Gemm
from fluxcli.engine.matmul.scaled import E4M3, E4M3_MAX
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import ROPE_THETA, Flux, FluxConfig, Step
from fluxcli.engine.weights.build import default_dtype
from fluxcli.engine.weights.random import fill_random
from jobs.tiny.evaluate import KINDS, cases
from jobs.tiny.judge import judge

BLOCK = 128
Format = Callable[[Tensor], Tensor]  # [rows, K] to 8 bits and back


def to_e4m3(x: Tensor, most: Tensor) -> Tensor:
    scale = most.clip(min=1e-30) / E4M3_MAX
    return (x / scale).to(E4M3).to(x.dtype) * scale


def by_tensor(x: Tensor) -> Tensor:
    return to_e4m3(x, x.abs().amax())


def by_row(x: Tensor) -> Tensor:
    return to_e4m3(x, x.abs().amax(-1, keepdim=True))


def by_part_of_row(x: Tensor) -> Tensor:
    """Of 1 x 128 numbers."""
    parts = x.unflatten(-1, (-1, BLOCK))
    return to_e4m3(parts, parts.abs().amax(-1, keepdim=True)).flatten(-2)


def by_square(x: Tensor) -> Tensor:
    """Of 128 x 128 numbers."""
    squares = x.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    return to_e4m3(squares, squares.abs().amax((1, 3), keepdim=True)).flatten(-2).flatten(0, 1)


# name: (activations, weights)
FORMATS: dict[str, tuple[Format, Format]] = {
    "a scale a tensor": (by_tensor, by_tensor),
    "a scale a row": (by_row, by_row),
    "1x128 and 128x128": (by_part_of_row, by_square),
}


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def with_outliers(rows: int, channels: int) -> Tensor:
    """Normal activations of which every 500th channel is 50 to 100 times larger."""
    x, count = torch.randn(rows, channels), channels // 500
    x[:, torch.randperm(channels)[:count]] *= torch.empty(count).uniform_(50, 100)
    return x


def products() -> None:
    torch.manual_seed(0)
    print("| matmul, K | outliers | bfloat16 | " + " | ".join(FORMATS) + " |\n|" + " --- |" * (3 + len(FORMATS)))
    for name, inputs in (("qkv, up", 3072), ("down", 12288), ("linear2", 15360)):
        for outliers in (False, True):
            x = with_outliers(512, inputs) if outliers else torch.randn(512, inputs)
            if name == "down":
                x = F.gelu(x, approximate="tanh")
            if name == "linear2":
                x = torch.cat((x[:, :3072] / 10, F.gelu(x[:, 3072:], approximate="tanh")), dim=1)
            weight = torch.randn(1024, inputs) * inputs**-0.5
            exact = F.linear(x, weight)
            figures = [error(F.linear(x.bfloat16(), weight.bfloat16()), exact)]
            figures += [error(F.linear(own(x), theirs(weight)), exact) for own, theirs in FORMATS.values()]
            row = [f"{name}, {inputs}", "yes" if outliers else "no", *(f"{each:.4f}" for each in figures)]
            print(f"| {' | '.join(row)} |")
            if name == "linear2":
                apart = torch.cat((by_row(x[:, :3072]), by_row(x[:, 3072:])), dim=1)
                print(
                    f"  a scale for each of linear2's two inputs: {error(F.linear(apart, by_row(weight)), exact):.4f}"
                )


class Emulated(Reference):
    """Plain matmuls on numbers that were in 8 bits, for the layers of blocks."""

    def __init__(self) -> None:
        self.formats: tuple[Format, Format] | None = None
        self.blocks: set[int] = set()
        self._weights: dict[Any, Tensor] = {}

    def __call__(self, gemm: Gemm) -> Tensor:
        if self.formats is None or gemm.weight.untyped_storage().data_ptr() not in self.blocks:
            return super().__call__(gemm)
        of_x, of_weight = self.formats
        key = gemm.weight.data_ptr(), gemm.weight.shape, of_weight
        if key not in self._weights:
            self._weights[key] = of_weight(gemm.weight)
        x = of_x(gemm.x.flatten(0, -2)).view(gemm.x.shape)
        return super().__call__(replace(gemm, x=x, weight=self._weights[key]))


def latents(heads: int, double: int, single: int, side: int, steps: int) -> None:
    config = FluxConfig(64, double, single, 128, heads, 4096, 768, guidance_embeds=True)
    multiply = Emulated()
    with default_dtype(torch.float32):
        flux = Flux(config, multiply).eval()
    fill_random(flux.slots(), "cpu", torch.float32)
    multiply.blocks = {
        layer.untyped_storage().data_ptr()
        for stack in (flux.double_blocks, flux.single_blocks) for layer in stack.parameters() if layer.ndim > 1
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    img, t5, vec = (torch.randn(1, *shape, generator=generator) for shape in ((side**2, 64), (64, 4096), (768,)))
    sigmas = torch.linspace(1, 0, steps + 1)

    def run(model: Flux, dtype: torch.dtype) -> Tensor:
        ids = denoise.position_ids(64, 2 * side, 2 * side, "cpu")
        step = Step(rope(ids, config.axes_dims_rope, ROPE_THETA), sdpa)
        with torch.inference_mode():
            txt = model.embed_text(t5.to(dtype))
            mods = model.modulations(sigmas[:-1] * 1000, torch.full((1,), 3.5), vec.to(dtype))
            x = img.to(dtype)
            for mod, dt in zip(mods, sigmas.diff(), strict=True):
                velocity = model.head(model.body(model.embed(x), txt, mod, step), mod)
                x = denoise.euler_step(x, velocity, dt)
        return x

    exact = run(flux, torch.float32)
    print(f"width {config.inner_dim}, {double} + {single} blocks, {side**2} + 64 tokens, {steps} steps")
    print(f"  moved by denoising   {error(exact, img):.4f}")
    for name, formats in FORMATS.items():
        multiply.formats = formats
        print(f"  {name:20s} {error(run(flux, torch.float32), exact):.5f}", flush=True)
    multiply.formats = None
    with default_dtype(torch.float32):
        eight = Flux(config, Reference(), fp8=True).eval()
    fill_random(eight.slots(), "cpu", torch.float32)
    print(f"  fluxcli's own fp8    {error(run(eight, torch.float32), exact):.5f}", flush=True)
    print(f"  bfloat16             {error(run(flux.bfloat16(), torch.bfloat16), exact):.5f}")


def meaning(count: int, dtype: str, directory: Path) -> None:
    """Draws `count` prompts of each kind, in `dtype` with and without 8 bits."""
    wanted = [case for kind in KINDS for case in cases(kind, count)]
    rows = [{"id": str(i), "prompt": case.prompt, "seed": case.seed} for i, case in enumerate(wanted)]
    (directory / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right: dict[str, list[bool]] = {}
    pixels: dict[str, list[Image.Image]] = {}
    for name in ("none", "fp8"):
        out = directory / name
        Job(directory / "in.jsonl", out, "tiny", dtype=dtype, quantization=name).run()
        pixels[name] = [Image.open(out / "images" / f"{i}.png").convert("RGB") for i in range(len(wanted))]
        with ProcessPoolExecutor(2) as workers:
            verdicts = list(workers.map(judge, pixels[name], [case.spec for case in wanted], chunksize=8))
        right[name] = [bool(verdict.right) for verdict in verdicts]
        print(f"{name}: {sum(right[name])} of {len(wanted)} right", flush=True)
    differences = [int(b) - int(a) for a, b in zip(right["none"], right["fp8"], strict=True)]
    mean = sum(differences) / len(differences)
    spread = math.sqrt(sum((each - mean) ** 2 for each in differences) / (len(differences) - 1) / len(differences))
    if not any(differences):  # none of so many: what share could still be missed once in twenty times
        spread = (1 - 0.05 ** (1 / len(differences))) / 1.96
    low, high = (100 * (mean + sign * 1.96 * spread) for sign in (-1, 1))
    print(f"fp8 less {dtype}: {100 * mean:+.1f} points, 95 % interval {low:+.1f} .. {high:+.1f} (pairs of one seed)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("products", "latents", "meaning"))
    parser.add_argument("--count", type=int, default=80, help="of meaning: prompts of each of the three kinds")
    parser.add_argument("--dtype", default="bfloat16", help="of meaning")
    parser.add_argument("--heads", type=int, default=8, help="of latents: width / 128")
    parser.add_argument("--blocks", type=int, nargs=2, default=(4, 8), help="of latents: double and single")
    parser.add_argument("--side", type=int, default=16, help="of latents: image tokens along a side")
    parser.add_argument("--steps", type=int, default=28, help="of latents")
    args = parser.parse_args()
    if args.what == "products":
        products()
    elif args.what == "latents":
        latents(args.heads, *args.blocks, args.side, args.steps)
    else:
        with tempfile.TemporaryDirectory() as directory:
            meaning(args.count, args.dtype, Path(directory))


if __name__ == "__main__":
    main()
