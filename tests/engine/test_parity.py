"""The image of a row is the one FluxPipeline makes: within one grey level in float32 on a CPU."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcli.core.records import Batch, PromptRecord, ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.models.checkpoints import resolve
from tests import pipelines
from tests.models.conftest import edit
from tests.pipelines import DEEP, DEV, SCHNELL, TINY, Shape

PROMPTS = ["a red circle", 'Ünïcödé 星 🐱, "quoted"', "a dog " * 30, "x"]


def records(shape: Shape | None, count: int, width: int, height: int, length: int, steps: int) -> list[PromptRecord]:
    guidance = None if shape and not shape.guidance else 3.5
    return [
        PromptRecord(
            str(i), PROMPTS[i % len(PROMPTS)], 1000 + i, width, height, steps, guidance and guidance + i, i + 1,
            text_tokens=1, text_length=length,
        )
        for i in range(count)
    ]  # fmt: skip


def run(engine: Engine, rows: list[PromptRecord], size: int | None = None) -> np.ndarray:
    first = rows[0]
    key = ShapeKey(size or len(rows), first.height, first.width, first.text_length)
    pictures = engine.submit(Batch(0, key, first.num_inference_steps, rows)).result()
    assert all(pictures.finite)
    return pictures.pixels


def reference(directory: Path, rows: list[PromptRecord]) -> np.ndarray:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(directory, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return np.stack(
        [
            np.asarray(
                pipe(
                    row.prompt,
                    negative_prompt=row.negative_prompt,
                    true_cfg_scale=row.true_cfg_scale,
                    width=row.width,
                    height=row.height,
                    num_inference_steps=row.num_inference_steps,
                    guidance_scale=row.guidance_scale or 0.0,
                    max_sequence_length=row.text_length,
                    generator=torch.Generator("cpu").manual_seed(row.seed),
                ).images[0]
            )
            for row in rows
        ]
    )


def worst(ours: np.ndarray, theirs: np.ndarray) -> int:
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


def cpu_engine(directory: Path) -> Engine:
    return Engine(resolve(str(directory)), resolve_device("cpu", "float32", None, "auto"))


@pytest.mark.parametrize("shape", [DEV, SCHNELL, DEEP], ids=lambda shape: shape.name)
def test_equals_diffusers(shape: Shape, pipeline) -> None:
    directory = pipeline(shape)
    engine = cpu_engine(directory)
    sizes = [(64, 64), (128, 64), (80, 144)]
    for (width, height), length, count in itertools.product(sizes, (16, 64), (1, 3)):
        rows = records(shape, count, width, height, length, steps=3)
        ours, theirs = run(engine, rows), reference(directory, rows)
        assert theirs.std() > 5, "a flat picture would prove nothing"
        assert worst(ours, theirs) <= 1, (width, height, length, count)


@pytest.mark.parametrize("length", [64, 512])
def test_the_built_in_model_equals_diffusers(length: int) -> None:
    rows = records(None, 2, 128, 96, length, steps=4)
    assert worst(run(cpu_engine(TINY), rows), reference(TINY, rows)) <= 1


@pytest.mark.skipif(not pipelines.REAL_DEV.is_dir(), reason="the real tokenizers are not beside the project")
def test_real_tokenizers_and_schedules_equal_diffusers(pipeline) -> None:
    for shape in (DEV, SCHNELL):
        directory = pipeline(shape, real=True)
        rows = records(shape, 2, 96, 64, 64, steps=5)
        assert worst(run(cpu_engine(directory), rows), reference(directory, rows)) <= 1


def test_kontext_draws_from_text_what_its_own_pipeline_draws(pipeline, tmp_path: Path) -> None:
    from diffusers import FluxKontextPipeline

    directory = Path(shutil.copytree(pipeline(DEV), tmp_path / "kontext"))
    edit(directory / "model_index.json", _class_name="FluxKontextPipeline")
    pipe = FluxKontextPipeline.from_pretrained(directory, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    (row,) = records(DEV, 1, 128, 64, 64, steps=3)
    theirs = pipe(
        prompt=row.prompt, width=128, height=64, max_area=128 * 64, num_inference_steps=3,
        guidance_scale=row.guidance_scale, max_sequence_length=64,
        generator=torch.Generator("cpu").manual_seed(row.seed),
    ).images[0]  # fmt: skip
    assert worst(run(cpu_engine(directory), [row])[0], np.asarray(theirs)) <= 1


def test_prompts_and_seeds_matter(pipeline) -> None:
    engine = cpu_engine(pipeline(DEV))
    rows = records(DEV, 4, 64, 64, 64, steps=3)
    pictures = run(engine, rows).astype(int)
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one - other).mean() > 1


def test_neighbours_and_slots_change_nothing_at_the_same_shape(pipeline) -> None:
    engine = cpu_engine(pipeline(DEV))
    rows = records(DEV, 4, 64, 64, 64, steps=3)
    others = records(DEV, 8, 64, 64, 64, steps=3)[4:]
    alone = run(engine, [rows[0], *others[:3]])[0]
    assert (alone == run(engine, rows)[0]).all()
    assert (alone == run(engine, [*others[:2], rows[0], others[3]])[2]).all()


def test_batch_size_and_padding_change_nothing_beyond_rounding(pipeline) -> None:
    engine = cpu_engine(pipeline(DEV))
    rows = records(DEV, 3, 64, 64, 64, steps=3)
    together = run(engine, rows)
    assert worst(together, np.concatenate([run(engine, [row]) for row in rows])) <= 1
    assert worst(together, run(engine, rows, size=4)) <= 1


def test_bfloat16_is_close_to_float32(pipeline) -> None:
    directory = pipeline(DEV)
    engine = Engine(resolve(str(directory)), resolve_device("cpu", "bfloat16", None, "auto"))
    rows = records(DEV, 2, 64, 64, 64, steps=3)
    difference = np.abs(run(engine, rows).astype(int) - bfloat16_reference(directory, rows).astype(int))
    assert difference.mean() < 3


def bfloat16_reference(directory: Path, rows: list[PromptRecord]) -> np.ndarray:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(directory, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    pictures = [
        pipe(
            row.prompt, width=row.width, height=row.height, num_inference_steps=row.num_inference_steps,
            guidance_scale=row.guidance_scale, max_sequence_length=row.text_length,
            generator=torch.Generator("cpu").manual_seed(row.seed),
        ).images[0]
        for row in rows
    ]  # fmt: skip
    return np.stack([np.asarray(picture) for picture in pictures])


def test_pictures_survive_the_trip_through_a_file(pipeline, tmp_path: Path) -> None:
    from fluxcli.core.config import ImageFormat
    from fluxcli.job.output.images import encode

    row = records(DEV, 1, 64, 64, 64, steps=2)[0]
    pixels = run(cpu_engine(pipeline(DEV)), [row])[0]
    path = tmp_path / "a.png"
    path.write_bytes(encode(pixels, ImageFormat(), row, "model"))
    assert (np.asarray(Image.open(path)) == pixels).all()
