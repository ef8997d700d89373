"""What --step-cache costs in pictures: every preset against the full run, beside fewer steps of equal cost.

    python -m jobs.bench.step_cache meaning [--steps 28] [--cases 120]     the built-in model, unseen prompts, the judge
    python -m jobs.bench.step_cache distance [MODEL] [--size 1024x1024]    latents of random weights, any model

Prints one JSON object; `figures` makes the table of docs/figures.md of those under results/step-cache-*.json.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fluxcli.bench.inputs import Inputs
from fluxcli.core.config import TEXT_LENGTHS
from fluxcli.core.records import Batch, PromptRecord, ShapeKey
from fluxcli.core.step_cache import PRESETS, StepCache
from fluxcli.engine.denoise import Moment, Schedule
from fluxcli.engine.engine import Engine
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.step_cache import ahead
from fluxcli.job.plan import bucket, plan
from fluxcli.models.checkpoints import Checkpoint, resolve
from fluxcli.models.step_cache import settled
from fluxcli.models.tokenizers import Tokenizers
from jobs.tiny.evaluate import KINDS, Case, cases, score

BATCH = 16


def contestants(checkpoint: Checkpoint, steps: int) -> Iterator[tuple[str, int, str]]:
    """(name, steps, mask): the full run, each preset, and as many plain steps as it evaluates."""
    yield "full", steps, ""
    for name in PRESETS:
        mask = settled(StepCache(name), checkpoint).mask(steps)
        yield name, steps, mask
        yield f"{mask.count('1')} steps", mask.count("1"), ""


def engine_of(checkpoint: Checkpoint, device: str, dtype: str) -> Engine:
    return Engine(checkpoint, replace(resolve_device(device, dtype, None, "auto"), step_cache=True))


def meaning(steps: int, count: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Adherence by the judge, and how far images are from the full run's: mean grey levels, and dB of PSNR."""
    checkpoint = resolve("tiny")
    engine = engine_of(checkpoint, "cpu", "float32")
    wanted = {kind: cases(kind, count) for kind in kinds}
    rows, full = [], {}
    for name, own, mask in contestants(checkpoint, steps):
        row: dict[str, Any] = {"name": name, "steps": own, "evaluated": mask.count("1") or own, "mask": mask}
        apart = []
        for kind, each in wanted.items():
            pixels = draw(engine, checkpoint, each, own, mask)
            full.setdefault(kind, pixels)
            row[kind] = score(list(pixels), each)["right"]
            apart.append(pixels.astype(np.float64) - full[kind])
        away = np.concatenate(apart)
        row["grey_levels"] = float(np.abs(away).mean())
        row["psnr"] = None if not away.any() else float(10 * np.log10(255**2 / (away**2).mean()))
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"model": "tiny", "steps": steps, "images": count * len(kinds), "rows": rows}


def draw(engine: Engine, checkpoint: Checkpoint, wanted: Sequence[Case], steps: int, mask: str) -> np.ndarray:
    """uint8 [N, H, W, 3], by the engine itself, batched by text length as a job does it."""
    defaults = checkpoint.row_defaults()
    counts = Tokenizers(checkpoint.tokenizers).count([case.prompt for case in wanted])
    records = [
        PromptRecord(
            str(number), case.prompt, case.seed, defaults.width, defaults.height, steps, defaults.guidance_scale, 1,
            text_tokens=tokens, text_length=bucket(tokens, TEXT_LENGTHS),
        )
        for number, (case, tokens) in enumerate(zip(wanted, counts, strict=True))
    ]  # fmt: skip
    images = {}
    for batch in plan([record.group for record in records], BATCH):
        part = [records[row] for row in batch.rows]
        pixels = engine.submit(Batch(0, batch.key, steps, part, mask)).result().pixels
        images.update(zip(batch.rows, pixels, strict=True))
    return np.stack([images[row] for row in range(len(records))])


def distance(checkpoint: Checkpoint, key: ShapeKey, steps: int, device: str, dtype: str) -> dict[str, Any]:
    """Latents' relative error against the full run, over random embeddings and noise."""
    engine = engine_of(checkpoint, device, dtype)
    inputs = Inputs(engine.flux, key, engine.config.device, engine.config.dtype)
    schedule = Schedule(checkpoint.directory / "scheduler")
    rows, full = [], None
    for name, own, mask in contestants(checkpoint, steps):
        start = time.perf_counter()
        sigmas = schedule(own, inputs.img.shape[1])[1].clone()
        with torch.inference_mode():
            txt, moments = inputs.ours(engine.flux, sigmas.tolist())
            evaluated = mask or "1" * own
            by = ahead(evaluated, sigmas).to(inputs.img.device)
            moments = [
                moment if one == "1" else Moment(moment.mod, moment.dt, each)
                for moment, one, each in zip(moments, evaluated, by, strict=True)
            ]
            img = engine.denoise(key, inputs.img, txt, moments).float().clone()
        full = img if full is None else full
        error = float(((img - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)).mean())
        rows.append({"name": name, "steps": own, "evaluated": mask.count("1") or own, "mask": mask, "error": error})
        print(json.dumps({**rows[-1], "seconds": time.perf_counter() - start}), flush=True)
    return {
        "model": checkpoint.name, "steps": steps, "shape": str(key), "dtype": engine.config.dtype,
        "double_blocks": engine.flux.config.num_layers, "single_blocks": engine.flux.config.num_single_layers,
        "width": engine.flux.config.inner_dim, "rows": rows,
    }  # fmt: skip


def shallow(directory: Path, double: int, single: int) -> Checkpoint:
    """FLUX.1-dev's widths with few blocks and small text encoders, random weights: what a CPU can hold."""
    source = resolve("random:flux-dev").directory
    changes = {
        "transformer": {"num_layers": double, "num_single_layers": single},
        "text_encoder_2": {"num_layers": 1, "d_ff": 64},
    }
    for path in source.rglob("*.json"):
        target = directory / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(json.loads(path.read_text()) | changes.get(path.parent.name, {})))
    return Checkpoint(f"random:flux-dev with {double} + {single} blocks", directory, random=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("meaning", "distance"))
    parser.add_argument("model", nargs="?", default="random:flux-dev")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--cases", type=int, default=120, help="prompts of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--size", default="1024x1024")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shallow", type=Path, help="write a model of few blocks there and take that")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.what == "meaning":
        result = meaning(given.steps, given.cases, given.kinds.split(","))
    else:
        width, height = map(int, given.size.split("x"))
        key = ShapeKey(given.batch_size, height, width, given.text_length)
        checkpoint = shallow(given.shallow, 2, 4) if given.shallow else resolve(given.model)
        result = distance(checkpoint, key, given.steps, given.device, given.dtype)
    result = {"torch": torch.__version__, "machine": platform.machine(), **result}
    text = json.dumps(result, indent=1)
    if given.output:
        given.output.write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
