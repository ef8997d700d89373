"""What only a GPU can show: fused kernels, captured graphs, bfloat16 parity, and caches that outlive the process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxcli.core.errors import DeviceError
from fluxcli.core.records import Batch, ShapeKey
from fluxcli.engine.denoise import stack_noise
from fluxcli.engine.engine import Engine
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.models.checkpoints import resolve
from tests.engine import test_true_cfg as true_cfg
from tests.engine.test_parity import records, run, worst
from tests.pipelines import DEEP, DEV, SCHNELL, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


def engine(directory: Path, dtype: str = "bfloat16", attention: str = "auto") -> Engine:
    return Engine(resolve(str(directory)), resolve_device("cuda", dtype, None, attention))


def diffusers_on_gpu(directory: Path, rows, dtype: torch.dtype, noise_dtype: torch.dtype) -> np.ndarray:
    """The reference, from noise drawn in `noise_dtype`: one seed gives bfloat16 and float32 different numbers."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(directory, dtype=dtype).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    pictures = [
        pipe(
            row.prompt, width=row.width, height=row.height, num_inference_steps=row.num_inference_steps,
            guidance_scale=row.guidance_scale or 0.0, max_sequence_length=row.text_length,
            latents=stack_noise([row.seed], 16, row.height // 8, row.width // 8, noise_dtype).to("cuda", dtype),
        ).images[0]
        for row in rows
    ]  # fmt: skip
    return np.stack([np.asarray(picture) for picture in pictures])


@pytest.mark.parametrize("shape", [DEV, SCHNELL, DEEP], ids=lambda shape: shape.name)
def test_bfloat16_is_as_close_to_the_truth_as_diffusers_is(shape: Shape, pipeline) -> None:
    directory = pipeline(shape)
    rows = records(shape, 3, 128, 64, 64, steps=4)
    ours = run(engine(directory), rows).astype(float)
    theirs = diffusers_on_gpu(directory, rows, torch.bfloat16, torch.bfloat16).astype(float)
    exact = diffusers_on_gpu(directory, rows, torch.float32, torch.bfloat16).astype(float)
    errors = [np.abs(a - b).mean() for a, b in ((ours, theirs), (ours, exact), (theirs, exact))]
    print("{}: ours-theirs {:.3f}, ours-exact {:.3f}, theirs-exact {:.3f} grey levels".format(shape.name, *errors))
    assert errors[1] <= 1.2 * errors[2] + 0.05


def test_float32_equals_diffusers(pipeline) -> None:
    directory = pipeline(DEV)
    rows = records(DEV, 2, 64, 64, 64, steps=3)
    theirs = diffusers_on_gpu(directory, rows, torch.float32, torch.float32)
    assert worst(run(engine(directory, "float32"), rows), theirs) <= 2


def test_every_step_is_one_replay_of_the_shapes_graph(pipeline) -> None:
    made = engine(pipeline(DEV))
    rows = records(DEV, 2, 64, 64, 64, steps=5)
    key = ShapeKey(2, 64, 64, 64)
    made.warm_up([key])
    assert made.replays == 0
    for _ in range(3):
        run(made, rows)
    assert made.replays == 15


def test_padding_neighbours_and_other_shapes_in_between_change_nothing(pipeline) -> None:
    made = engine(pipeline(DEV))
    rows = records(DEV, 4, 64, 64, 64, steps=3)
    full = run(made, rows)
    wide = run(made, records(DEV, 2, 128, 64, 64, steps=2))
    assert (run(made, rows[:3], size=4) == full[:3]).all()
    assert (run(made, rows[::-1])[::-1] == full).all()
    assert (run(made, records(DEV, 2, 128, 64, 64, steps=2)) == wide).all()


def test_two_batches_in_flight_keep_their_own_pixels(pipeline) -> None:
    made = engine(pipeline(DEV))
    rows = records(DEV, 4, 64, 64, 64, steps=3)
    key = ShapeKey(2, 64, 64, 64)
    one, two = (Batch(i, key, 3, rows[2 * i : 2 * i + 2]) for i in range(2))
    made.warm_up([key])
    first, second = made.submit(one), made.submit(two)
    assert (first.result().pixels == run(made, rows[:2])).all()
    assert (second.result().pixels == run(made, rows[2:])).all()


@pytest.mark.parametrize("backend", ["cudnn", "sdpa", "fa4"])
def test_every_installed_attention_gives_the_same_picture(backend: str, pipeline) -> None:
    directory = pipeline(DEEP)
    try:
        made = engine(directory, attention=backend)
    except DeviceError as error:
        pytest.skip(str(error))
    rows = records(DEEP, 2, 128, 128, 64, steps=3)
    difference = np.abs(run(made, rows).astype(int) - run(engine(directory, attention="sdpa"), rows).astype(int))
    assert difference.mean() < 2


def test_true_cfg_is_captured_with_its_scales_as_inputs(pipeline) -> None:
    """One graph for a shape, whatever the scales; and diffusers' images."""
    directory, rows = pipeline(DEV), true_cfg.records(DEV, 2)
    made = engine(directory, "float32")
    made.warm_up([rows[0].group.shape(2)])
    ours = true_cfg.drawn(made, rows)
    assert worst(ours, true_cfg.reference(directory, rows)) <= 2
    other = true_cfg.drawn(made, [replace(row, true_cfg_scale=1.0 + row.true_cfg_scale) for row in rows])
    assert np.abs(other.astype(int) - ours).mean() > 1
    assert (true_cfg.drawn(made, rows) == ours).all()
    assert made.replays == 9


def test_true_cfg_with_a_step_cache_is_what_the_cpu_makes(pipeline) -> None:
    directory, rows, mask = pipeline(DEV), true_cfg.records(DEV, 2, steps=6), "110101"
    made = Engine(resolve(str(directory)), replace(resolve_device("cuda", "float32", None, "auto"), step_cache=True))
    expected = true_cfg.drawn(true_cfg.engine_of(directory, step_cache=True), rows, mask=mask)
    assert worst(true_cfg.drawn(made, rows, mask=mask), expected) <= 2


def test_an_attention_that_cannot_run_is_refused(pipeline) -> None:
    with pytest.raises(DeviceError, match="--attention cudnn"):
        engine(pipeline(DEV), dtype="float32", attention="cudnn")


def test_a_second_process_compiles_nothing(pipeline, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fluxcli", "warmup", "-m", pipeline(DEV), "--size", "128x64", "--batch-size", "2",
        "--text-lengths", "64,128", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "FLUXCLI_CACHE": str(tmp_path)}
    first, second = (
        json.loads(subprocess.run(command, capture_output=True, check=True, env=environment).stdout) for _ in range(2)
    )
    # The second shape shares the kernels of the first, or brings a few of its own.
    assert first["shapes"][0]["state"] == "cold"
    assert second["shapes"][0]["state"] == "cached"
    assert second["shapes"][1]["state"] != "cold"


def test_without_compile_the_same_kernels_run_uncaptured(pipeline) -> None:
    rows = records(DEV, 2, 64, 64, 64, steps=3)
    config = resolve_device("cuda", "bfloat16", False, "auto")
    plain = Engine(resolve(str(pipeline(DEV))), config)
    difference = run(plain, rows).astype(int) - run(engine(pipeline(DEV)), rows).astype(int)
    assert np.abs(difference).mean() < 1  # cuBLAS may choose otherwise in a capture
    assert plain.replays == 0
