"""True CFG is FluxPipeline's: `negative_prompt` with a `true_cfg_scale` above 1, to one grey level in float32."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxcli.core.config import EngineConfig
from fluxcli.core.records import Batch, PromptRecord
from fluxcli.engine import denoise, memory, step_cache
from fluxcli.engine.attention.backends import sdpa
from fluxcli.engine.engine import Engine
from fluxcli.engine.layers.residual import Residual
from fluxcli.engine.layers.rope import rope
from fluxcli.engine.nets.flux1 import ROPE_THETA, Step
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.text import TextEncoders
from fluxcli.engine.vae import Decoder
from fluxcli.models.checkpoints import resolve
from tests.engine.test_parity import reference, worst
from tests.pipelines import DEEP, DEV, SCHNELL, Shape

Pipeline = Callable[..., Path]
NEGATIVES = ["a blue square", "", "ugly " * 20]


def records(shape: Shape, count: int, length: int = 64, steps: int = 3, size: int = 64) -> list[PromptRecord]:
    guidance = 3.5 if shape.guidance else None
    return [
        PromptRecord(
            str(number), ("a red circle", "Ünïcödé 星")[number % 2], 7 + number, size, 64, steps, guidance, number + 1,
            text_tokens=1, text_length=length, negative_prompt=NEGATIVES[number % 3], true_cfg_scale=1.5 + 2 * number,
        )
        for number in range(count)
    ]  # fmt: skip


def engine_of(directory: Path, **changes: object) -> Engine:
    return Engine(resolve(str(directory)), replace(resolve_device("cpu", "float32", None, "auto"), **changes))


def drawn(engine: Engine, rows: list[PromptRecord], images: int | None = None, mask: str = "") -> np.ndarray:
    key = rows[0].group.shape(images or len(rows))
    made = engine.submit(Batch(0, key, rows[0].num_inference_steps, rows, mask)).result()
    assert all(made.finite)
    return made.pixels


@pytest.mark.parametrize("shape", [DEV, SCHNELL, DEEP], ids=lambda shape: shape.name)
def test_equals_diffusers(shape: Shape, pipeline: Pipeline) -> None:
    directory = pipeline(shape)
    engine = engine_of(directory)
    for length, count, size in ((64, 1, 64), (64, 3, 128), (16, 2, 64)):
        rows = records(shape, count, length, size=size)
        ours, theirs = drawn(engine, rows), reference(directory, rows)
        assert theirs.std() > 5, "a flat picture would prove nothing"
        assert worst(ours, theirs) <= 1, (length, count)


def test_it_matters_and_each_image_has_its_own(pipeline: Pipeline) -> None:
    engine = engine_of(pipeline(DEV))
    row = records(DEV, 1)[0]
    plain = replace(row, negative_prompt=None, true_cfg_scale=1.0)
    variants = [row, replace(row, true_cfg_scale=4.0), replace(row, negative_prompt="x")]
    pictures = [*drawn(engine, variants), *drawn(engine, [plain])]
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one.astype(int) - other).mean() > 1


def test_batch_size_padding_and_neighbours_change_nothing_beyond_rounding(pipeline: Pipeline) -> None:
    engine = engine_of(pipeline(DEV))
    rows = records(DEV, 3)
    together = drawn(engine, rows)
    assert worst(together, np.concatenate([drawn(engine, [row]) for row in rows])) <= 1
    assert worst(together, drawn(engine, rows, images=4)) <= 1
    plain = [replace(row, negative_prompt=None, true_cfg_scale=1.0) for row in rows]
    first = drawn(engine, plain)
    drawn(engine, rows)
    assert (drawn(engine, plain) == first).all(), "a shape of its own"


def test_a_prompt_against_itself_is_the_prompt(pipeline: Pipeline) -> None:
    engine = engine_of(pipeline(DEV))
    rows = [replace(row, negative_prompt=row.prompt) for row in records(DEV, 2)]
    plain = [replace(row, negative_prompt=None, true_cfg_scale=1.0) for row in rows]
    assert worst(drawn(engine, rows), drawn(engine, plain)) <= 1


def test_with_a_step_cache_each_branch_keeps_its_own(pipeline: Pipeline) -> None:
    """A mask of ones is no cache at all; and a batch is what its images are alone."""
    directory, rows = pipeline(DEV), records(DEV, 3, steps=6)
    engine = engine_of(directory, step_cache=True)
    assert (drawn(engine, rows, mask="111111") == drawn(engine_of(directory), rows)).all()
    mask = "110101"
    cached = drawn(engine, rows, mask=mask)
    assert np.abs(cached.astype(int) - drawn(engine, rows)).mean() > 0.1
    assert worst(cached, np.concatenate([drawn(engine, [row], mask=mask) for row in rows])) <= 1
    with_plain = [replace(row, negative_prompt=row.prompt) for row in rows]
    plain = [replace(row, negative_prompt=None, true_cfg_scale=1.0) for row in rows]
    assert worst(drawn(engine, with_plain, mask=mask), drawn(engine, plain, mask=mask)) <= 1


def test_with_a_cache_it_is_the_reference_written_plainly(pipeline: Pipeline) -> None:
    """Two runs side by side, each with its own cache, their velocities combined at every step."""
    directory, mask = pipeline(DEV), "110101"
    engine = engine_of(directory, step_cache=True)
    (row,) = records(DEV, 1, steps=6)
    flux, text = engine.flux, TextEncoders(resolve(str(directory)), "cpu", torch.float32)
    timesteps, sigmas = denoise.Schedule(directory / "scheduler")(6, 16)
    ahead = step_cache.ahead(mask, sigmas)
    ids = denoise.position_ids(64, 8, 8, "cpu")
    step = Step(rope(ids, flux.config.axes_dims_rope, ROPE_THETA), sdpa)
    with torch.inference_mode():
        given = [embedding for _, embedding in text([row.prompt, str(row.negative_prompt)], 64)]
        img = denoise.stack_noise([row.seed], 16, 8, 8, torch.float32)
        last = [torch.zeros(1, 16, flux.config.inner_dim) for _ in given]
        change = [*last]
        for number, evaluated in enumerate(mask):
            velocities = []
            for branch, (txt, vec) in enumerate(given):
                at, guidance = timesteps[number : number + 1], torch.tensor([row.guidance_scale])
                mod, embedded = flux.modulations(at, guidance, vec[None])[0], flux.embed(img)
                added = last[branch] + ahead[number] * change[branch]
                if evaluated == "1":
                    added = flux.body(embedded, flux.embed_text(txt[None]), mod, step).value() - embedded
                    last[branch], change[branch] = added, added - last[branch]
                velocities.append(flux.head(Residual(embedded + added), mod))
            positive, negative = velocities
            img += (sigmas[number + 1] - sigmas[number]) * (negative + row.true_cfg_scale * (positive - negative))
        pixels, _ = Decoder(resolve(str(directory)), "cpu", torch.float32, False)(denoise.unpack(img, 8, 8))
    assert worst(pixels.numpy(), drawn(engine, [row], mask=mask)) <= 1


def test_in_fp8_on_a_cpu_an_image_depends_on_nothing_else(pipeline: Pipeline) -> None:
    engine = engine_of(pipeline(DEV), quantization="fp8")
    rows = records(DEV, 3)
    together = drawn(engine, rows)
    assert worst(together, np.concatenate([drawn(engine, [row]) for row in rows])) <= 1  # of decoding
    assert 0 < np.abs(together.astype(int) - drawn(engine_of(pipeline(DEV)), rows)).mean() < 20


@pytest.mark.slow
def test_compiled_blocks_draw_the_same(pipeline: Pipeline) -> None:
    directory, rows = pipeline(DEV), records(DEV, 2)
    engine = engine_of(directory, compile=True)
    (one,) = engine.warm_up([rows[0].group.shape(2)])
    assert one.key.branches == 2 and one.graphs
    assert worst(drawn(engine, rows), drawn(engine_of(directory), rows)) <= 1
    assert not engine.warm_up([rows[0].group.shape(2)])[0].graphs


def test_memory_is_planned_for_both_branches() -> None:
    """Of twice the rows; and of as many images to decode."""
    needs = memory.Needs(resolve("random:flux-dev"), torch.bfloat16, step_cache=True)
    row = records(DEV, 1, length=512, size=1024)[0]
    guided = replace(row, height=1024).group
    plain = guided._replace(branches=1)
    assert needs.shapes([guided.shape(4)]) == needs.shapes([plain.shape(8)])
    assert needs.shapes([guided.shape(4)]) > needs.shapes([plain.shape(4)])
    assert needs.shapes([guided.shape(4), plain.shape(8)]) >= needs.shapes([plain.shape(8)])


def test_a_config_that_does_not_fit_with_it_is_told_before_loading() -> None:
    config = EngineConfig("cuda:0", "bfloat16", True)
    guided = replace(records(DEV, 1, length=512, size=1024)[0], height=1024).group
    checkpoint = resolve("random:flux-dev")
    least = memory.plan(checkpoint, config, [guided.shape(1)], 200 * 10**9).needed
    assert least > memory.plan(checkpoint, config, [guided._replace(branches=1).shape(1)], 200 * 10**9).needed
