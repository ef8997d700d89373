"""One denoising step at FLUX.1-dev's full size: ours against diffusers with compiled blocks and cuDNN attention.

Random weights, one copy of them shared by both; rounds interleaved; medians. Also how far both are, in bfloat16, from
diffusers in float32 on the same weights, after a few steps. Needs a GPU with about 110 GB (80 GB with --no-parity).

    python jobs/bench/versus_diffusers.py --batch 1 8 --text 512 --out result.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxcli.checkpoints import resolve
from fluxcli.engine import sampling
from fluxcli.engine.cache import compile_counts
from fluxcli.engine.device import machine
from fluxcli.engine.device import resolve as resolve_device
from fluxcli.engine.engine import Engine
from fluxcli.records import ShapeKey

PIXELS = 1024
DT = torch.tensor(-0.03)


def seconds(run: Callable[[], Any], times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def diffusers_twin(engine: Engine, config: dict[str, Any]) -> Any:
    """diffusers' transformer over the very tensors of ours."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        twin = FluxTransformer2DModel.from_config(config)
    twin.load_state_dict(dict(engine._flux.slots()), assign=True)
    return twin.eval().requires_grad_(False)


class Inputs:
    """What a step takes, in both models' terms."""

    def __init__(self, engine: Engine, batch: int, text: int) -> None:
        torch.manual_seed(0)
        side = PIXELS // 8
        config = engine._flux.config
        self.img = torch.randn(batch, side * side // 4, config.in_channels, device="cuda", dtype=torch.bfloat16)
        self.t5 = torch.randn(batch, text, config.joint_attention_dim, device="cuda", dtype=torch.bfloat16)
        self.vec = torch.randn(batch, config.pooled_projection_dim, device="cuda", dtype=torch.bfloat16)
        ids = sampling.position_ids(text, side, side, "cuda").to(torch.bfloat16)
        self.txt_ids, self.img_ids = ids[:text], ids[text:]
        self.guidance = torch.full((batch,), 3.5, device="cuda")

    def twin_step(self, twin: Any, img: Tensor, sigma: float, dt: float) -> Tensor:
        dtype = next(twin.parameters()).dtype
        velocity = twin(
            hidden_states=img,
            timestep=torch.full((len(img),), sigma, device="cuda", dtype=dtype),
            guidance=self.guidance,
            pooled_projections=self.vec.to(dtype),
            encoder_hidden_states=self.t5.to(dtype),
            txt_ids=self.txt_ids,
            img_ids=self.img_ids,
            return_dict=False,
        )[0]
        return (img.float() + dt * velocity.float()).to(img.dtype)


def parity(engine: Engine, twin: Any, config: dict[str, Any], steps: int = 4) -> dict[str, float]:
    """Relative error of the latents after a few steps, ||a - b|| / ||b||, at batch 1."""
    inputs = Inputs(engine, 1, 128)
    prepared = engine._prepare(ShapeKey(1, PIXELS, PIXELS, 128))
    sigmas = torch.linspace(1, 0, steps + 1)
    mods = engine._flux.modulations(sigmas[:-1].cuda() * 1000, inputs.guidance, inputs.vec)
    dts = sigmas.diff().cuda()
    ours = prepared.graph.run(inputs.img, engine._flux.embed_text(inputs.t5), zip(mods, dts, strict=True)).clone()

    def run(model: Any, dtype: torch.dtype) -> Tensor:
        img = inputs.img.to(dtype)
        for sigma, dt in zip(sigmas[:-1].tolist(), sigmas.diff().tolist(), strict=True):
            img = inputs.twin_step(model, img, sigma, dt)
        return img.float()

    theirs = run(twin, torch.bfloat16)
    exact_model = diffusers_twin(engine, config).to(torch.float32)
    exact = run(exact_model, torch.float32)

    def error(a: Tensor, b: Tensor) -> float:
        return ((a.float() - b).norm() / b.norm()).item()

    return {
        "ours_to_diffusers_bf16": error(ours, theirs),
        "ours_to_diffusers_fp32": error(ours, exact),
        "diffusers_bf16_to_fp32": error(theirs, exact),
        "change_by_denoising": error(exact, inputs.img.float()),
    }


@torch.inference_mode()
def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--text", type=int, default=512)
    arguments.add_argument("--attention", default="auto")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--no-parity", action="store_true")
    arguments.add_argument("--out", type=Path)
    args = arguments.parse_args()

    config = resolve_device("cuda", "bfloat16", True, args.attention)
    checkpoint = resolve("random:flux-dev")
    start = time.perf_counter()
    engine = Engine(checkpoint, config)
    result: dict[str, Any] = {**machine(config), "load_s": time.perf_counter() - start, "shapes": []}
    twin = diffusers_twin(engine, checkpoint.transformer)
    if not args.no_parity:
        result["parity"] = parity(engine, twin, checkpoint.transformer)
        torch.cuda.empty_cache()
    twin.set_attention_backend("_native_cudnn")  # for all of diffusers in this process, so after the float32 run
    twin.compile_repeated_blocks(fullgraph=True, dynamic=False)
    for batch in args.batch:
        key = ShapeKey(batch, PIXELS, PIXELS, args.text)
        (warm,) = engine.warm_up([key])
        graph = engine._prepared[key].graph
        inputs = Inputs(engine, batch, args.text)
        mod = engine._flux.modulations(torch.tensor([900.0], device="cuda"), inputs.guidance, inputs.vec)
        once = [(mod[0], DT.cuda())]
        txt = engine._flux.embed_text(inputs.t5)

        def ours(graph=graph, inputs=inputs, txt=txt, once=once) -> None:
            graph.run(inputs.img, txt, once)

        def theirs(inputs=inputs) -> None:
            inputs.twin_step(twin, inputs.img, 0.9, -0.03)

        for run in (ours, theirs):
            for _ in range(3):
                run()
        times = max(2, 12 // batch)
        rounds = [(seconds(ours, times), seconds(theirs, times)) for _ in range(args.rounds)]
        a, b = (statistics.median(each) * 1e3 / batch for each in zip(*rounds, strict=True))
        row = {
            **key._asdict(), "attention": warm.attention, "warm_up_s": warm.seconds, "ms_per_image_step": a,
            "diffusers_ms_per_image_step": b, "ratio": a / b, "rounds": rounds,
        }  # fmt: skip
        result["shapes"].append(row)
        print(f"{key}: ours {a:.2f} ({warm.attention}), diffusers {b:.2f} ms per image and step, ratio {a / b:.3f}")
    result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    result["compile"] = dict(compile_counts())
    print({name: round(value, 5) for name, value in result.get("parity", {}).items()})
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        sys.stdout.write(text + "\n")


main()
