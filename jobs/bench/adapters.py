"""How long a running engine takes to change its adapters, with copies of its weights on the host and on the GPU, and
whether a step takes longer with them.

    python -m jobs.bench.adapters --model random:flux-dev --rank 16
    python -m jobs.bench.adapters --model random:flux-dev --rank 16 --quantization fp8

Two adapters of all matrices in the blocks are written, with random values, and merged by turns. The first swap makes
the copies and is told apart. `read_s` is opening and hashing a file, which `swap_s` includes; both end when the GPU is
done. Without `--copies` it is an engine with copies on the device, then one with copies on the host.
"""

import argparse
import gc
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from fluxcli.bench.inputs import Inputs
from fluxcli.core.config import EngineConfig
from fluxcli.core.records import Adapter, Adapters, ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.runtime import device, stopwatch
from fluxcli.engine.runtime.compile_cache import compile_counts
from fluxcli.engine.weights.adapters import Read
from fluxcli.models.checkpoints import Checkpoint, resolve
from fluxcli.models.flux1 import targets
from fluxcli.models.flux1.names import diffusers


def written(checkpoint: Checkpoint, path: Path, rank: int, seed: int) -> Adapter:
    """An adapter of every matrix in the blocks, modulation aside: what most trainers make."""
    generator = torch.Generator().manual_seed(seed)
    config = checkpoint.transformer
    table = targets.transformer(config)
    names = [
        source.name
        for ours, sources in diffusers(config["num_layers"], config["num_single_layers"], config["guidance_embeds"])
        if "_blocks" in ours and not ours.endswith("norm")
        for source in sources
    ]
    tensors = {}
    for name in names:
        rows, columns = table[targets.spelled(name)].shape
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        up = torch.randn(rows, rank, generator=generator) * 0.05 * rank**-0.5
        tensors[f"transformer.{name}.lora_A.weight"] = down.bfloat16()
        tensors[f"transformer.{name}.lora_B.weight"] = up.bfloat16()
    save_file(tensors, path)
    return Adapter(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 1.0)


def seconds(engine: Engine, adapters: Adapters) -> float:
    """Of one swap, until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.merged.use(adapters)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(
    checkpoint: Checkpoint, config: EngineConfig, key: ShapeKey, files: Sequence[Adapter], rounds: int, copies: str
) -> dict[str, Any]:
    """One engine's figures. Only where copies are to be on the device is it told what it will run, and knows with that
    which memory is spare."""
    engine = Engine(checkpoint, config, [key] if copies == "device" else ())
    engine.warm_up([key])
    inputs = Inputs(engine.flux, key, config.device, config.dtype)
    with torch.inference_mode():
        txt, (moment,) = inputs.ours(engine.flux, [0.9, 0.87])

    def step() -> Any:
        return engine.denoise(key, inputs.img, txt, [moment])

    def step_ms() -> float:
        return round(stopwatch.milliseconds(stopwatch.interleaved({"step": step}, config.device, 2.0)["step"]), 2)

    before = step_ms()
    first = seconds(engine, (files[0],))
    graphs = compile_counts()["graphs"]
    swaps = [seconds(engine, (files[turn % 2],)) for turn in range(1, 1 + rounds)]
    both, back = seconds(engine, tuple(files)), seconds(engine, ())
    seconds(engine, (files[0],))
    start = time.perf_counter()
    Read(files[0], checkpoint.adapters)
    read = time.perf_counter() - start
    return {
        "copies": copies,
        "copied_gb": {where: round(size / 1e9, 2) for where, size in engine.merged.copies.items()},
        "first_s": round(first, 3),
        "swap_s": {"median": round(median(swaps), 3), "least": round(min(swaps), 3), "most": round(max(swaps), 3)},
        "two_adapters_s": round(both, 3),
        "back_to_none_s": round(back, 3),
        "read_s": round(read, 3),
        "step_ms": {"without": before, "with": step_ms()},
        "compiled_since": compile_counts()["graphs"] - graphs,
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:flux-dev")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--copies", nargs="+", choices=("device", "host"), default=("device", "host"))
    asked = parser.parse_args()
    checkpoint = resolve(asked.model)
    config = device.resolve("cuda", "bfloat16", None, "auto", asked.quantization)
    key = ShapeKey(asked.batch_size, asked.side, asked.side, 512)
    with tempfile.TemporaryDirectory() as folder:
        files = [written(checkpoint, Path(folder) / f"{seed}.safetensors", asked.rank, seed) for seed in range(2)]
        size = Path(files[0].path).stat().st_size
        runs = []
        for copies in asked.copies:
            torch.cuda.reset_peak_memory_stats()
            runs.append(measured(checkpoint, config, key, files, asked.rounds, copies))
            gc.collect()
            torch.cuda.empty_cache()
            print(json.dumps(runs[-1]), flush=True)
    about = {"model": asked.model, "rank": asked.rank, "adapter_mb": round(size / 1e6), "shape": str(key)}
    print(json.dumps({**device.machine(config), **about, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
