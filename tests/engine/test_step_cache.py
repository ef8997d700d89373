"""A row's image under a mask is the one that a plain loop over diffusers' own modules makes of that row alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxcli.core.records import Batch, PromptRecord, ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.step_cache import Added, Kept, ahead
from fluxcli.models.checkpoints import resolve
from tests.engine.test_parity import cpu_engine, records, worst
from tests.pipelines import DEV

STEPS = 6
MASKS = st.text("01", min_size=STEPS - 1, max_size=STEPS - 1).map(lambda rest: f"1{rest}")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Images so small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(pipeline: Callable) -> Engine:
    return masked_engine(pipeline(DEV))


def masked_engine(
    directory: object, device: str = "cpu", dtype: str = "float32", compile: bool | None = None
) -> Engine:
    config = replace(resolve_device(device, dtype, compile, "auto"), step_cache=True)
    return Engine(resolve(str(directory)), config)


def run(engine: Engine, rows: list[PromptRecord], mask: str, size: int | None = None) -> np.ndarray:
    first = rows[0]
    key = ShapeKey(size or len(rows), first.height, first.width, first.text_length)
    pictures = engine.submit(Batch(0, key, first.num_inference_steps, rows, mask)).result()
    assert all(pictures.finite)
    return pictures.pixels


@pytest.fixture(scope="module")
def reference(pipeline: Callable) -> Callable[[int, str], np.ndarray]:
    """The image of a row alone under a mask, plainly: diffusers' modules, and half of the last change at most."""
    from diffusers import FluxPipeline

    pipe, seen = FluxPipeline.from_pretrained(pipeline(DEV), dtype=torch.float32), {}
    pipe.transformer.x_embedder.register_forward_hook(lambda module, given, made: seen.update(embedded=made))
    pipe.transformer.norm_out.register_forward_pre_hook(lambda module, given: seen.update(last=given[0]))
    return cache(partial(_reference, pipe, seen))


@torch.inference_mode()
def _reference(pipe, seen: dict[str, Tensor], number: int, mask: str) -> np.ndarray:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    row, flux = rows()[number], pipe.transformer
    txt, vec, txt_ids = pipe.encode_prompt(row.prompt, row.prompt, max_sequence_length=row.text_length)
    noise = torch.Generator("cpu").manual_seed(row.seed)
    img, img_ids = pipe.prepare_latents(1, 16, row.height, row.width, txt.dtype, "cpu", noise)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / len(mask), len(mask)), mu=calculate_shift(img.shape[1]))
    sigmas, guidance = pipe.scheduler.sigmas, torch.tensor([row.guidance_scale])

    kept: list[tuple[int, Tensor]] = []  # (step, what the blocks added), the latest first
    for step, sigma in enumerate(sigmas[:-1]):
        time = sigma.expand(1)
        if mask[step] == "1":
            velocity = flux(img, txt, vec, time, img_ids, txt_ids, guidance, return_dict=False)[0]
            kept.insert(0, (step, seen["last"][:, -img.shape[1] :] - seen["embedded"]))
        else:
            (last, added), *before = kept
            if before and before[0][0] > 0:
                change = (sigma - sigmas[last]) / (sigmas[last] - sigmas[before[0][0]])
                added = added + 0.5 * min(change, 1) * (added - before[0][1])
            emb = flux.time_text_embed(time * 1000, guidance * 1000, vec)
            velocity = flux.proj_out(flux.norm_out(flux.x_embedder(img) + added, emb))
        img = img + (sigmas[step + 1] - sigma) * velocity

    latents = pipe._unpack_latents(img, row.height, row.width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="np")[0]
    return (pixels * 255).round().astype(np.uint8)


@cache
def rows() -> list[PromptRecord]:
    return records(DEV, 5, 64, 64, 64, STEPS)


@settings(max_examples=12, deadline=None)
@given(MASKS, st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True), st.integers(0, 1))
def test_an_image_depends_on_its_row_and_the_mask_alone(
    engine: Engine, reference: Callable, mask: str, order: list[int], padding: int
) -> None:
    made = run(engine, [rows()[number] for number in order], mask, len(order) + padding)
    alone = np.stack([reference(number, mask) for number in order])
    assert worst(made, alone) <= 1, (mask, order)


def test_masks_matter(engine: Engine, reference: Callable) -> None:
    """Else the test above would prove nothing."""
    images = [reference(0, mask).astype(int) for mask in ("111111", "110101", "110010", "100000")]
    for one in range(4):
        for other in range(one):
            assert np.abs(images[one] - images[other]).mean() > 0.5, (one, other)


def test_a_mask_of_ones_is_off_to_the_last_bit(engine: Engine, pipeline: Callable) -> None:
    off = cpu_engine(pipeline(DEV))
    plain = off.submit(Batch(0, ShapeKey(3, 64, 64, 64), STEPS, rows()[:3])).result().pixels
    assert (run(engine, rows()[:3], "1" * STEPS) == plain).all()
    assert (run(engine, rows()[:3], "") == plain).all()


def test_batches_and_shapes_in_between_change_nothing(engine: Engine) -> None:
    mask = "110100"
    first = run(engine, rows()[:2], mask)
    wide = records(DEV, 3, 128, 64, 64, STEPS)
    other = run(engine, wide, mask)
    assert (run(engine, rows()[2:4], "100100") == run(engine, rows()[2:4], "100100")).all()
    assert (run(engine, rows()[:2], mask) == first).all()
    assert (run(engine, wide, mask) == other).all()


def test_what_was_not_finite_ends_with_its_batch(engine: Engine) -> None:
    mask = "100100"
    good = run(engine, rows()[:2], mask)
    bad = [replace(rows()[0], guidance_scale=float("nan")), rows()[1]]
    key = ShapeKey(2, 64, 64, 64)
    result = engine.submit(Batch(0, key, STEPS, bad, mask)).result()
    assert result.finite == [False, True]
    assert (result.pixels[1] == good[1]).all()
    assert (run(engine, rows()[:2], mask) == good).all()


def test_bfloat16_is_as_close_to_float32_as_without_a_mask(engine: Engine, pipeline: Callable) -> None:
    half, some = masked_engine(pipeline(DEV), dtype="bfloat16"), rows()[:3]
    # One seed gives each dtype its own noise, so the images are compared through how far a mask moves them.
    for mask in ("110101", "110010"):
        moved = [np.abs(run(e, some, mask).astype(int) - run(e, some, "").astype(int)).mean() for e in (engine, half)]
        assert moved[1] == pytest.approx(moved[0], rel=0.5)


def test_a_change_is_carried_on_by_half_at_most_and_none_from_the_first_step() -> None:
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.6, 0.5, 0.3, 0.0])
    assert ahead("111111", sigmas).tolist() == [0] * 6
    assert ahead("110000", sigmas).tolist() == [0] * 6
    assert ahead("111000", sigmas).tolist() == pytest.approx([0, 0, 0, 0.5, 0.5, 0.5])
    assert ahead("111010", sigmas).tolist() == pytest.approx([0, 0, 0, 0.5, 0, 0.5 * 2 / 3])
    assert ahead("111010", torch.full((7,), 0.5)).tolist() == [0] * 6


def test_the_prediction_is_what_it_says() -> None:
    one, two = torch.randn(2, 2, 3, 4)
    added = Added(torch.full((2, 2, 3, 4), torch.nan))
    added.clear()
    added.keep(one)
    assert torch.equal(added.predicted(torch.tensor(0.0)), one)
    added.keep(two)
    assert torch.allclose(added.predicted(torch.tensor(0.25)), two + 0.25 * (two - one))


def test_all_shapes_share_the_memory_of_the_largest() -> None:
    kept = Kept("cpu", torch.float32)
    large, small = kept.at(2, 16, 8), kept.at(1, 16, 8)
    assert small.last.data_ptr() == large.last.data_ptr()
    assert large.last.shape == (2, 16, 8) and small.last.shape == (1, 16, 8)


def test_ratios_are_those_of_magcache(engine: Engine) -> None:
    """The mean over image tokens of a norm over the norm before it, by hooks of our own."""
    row, norms = rows()[0], []
    flux, body = engine.flux, engine.flux.body

    def watched(img: Tensor, *rest: object):
        stream = body(img, *rest)
        norms.append((stream.value() - img).norm(dim=-1))
        return stream

    flux.body = watched
    try:
        ratios = engine.ratios(Batch(0, ShapeKey(1, 64, 64, 64), STEPS, [row]))
    finally:
        del flux.body
    wanted = [1.0, *(float((now / before).mean()) for before, now in pairwise(norms))]
    assert ratios == pytest.approx(wanted, rel=1e-4) and len(ratios) == STEPS
