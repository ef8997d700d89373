"""fp8: a step is the one that diffusers makes with its large matmuls on numbers in 8 bits."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcli.bench import peers
from fluxcli.bench.inputs import Inputs
from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import DeviceError, OutOfMemory
from fluxcli.core.records import ShapeKey
from fluxcli.engine import memory
from fluxcli.engine.attention.backends import sdpa
from fluxcli.engine.engine import Engine
from fluxcli.engine.layers.rope import rope
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import ROPE_THETA, Flux, Step
from fluxcli.engine.runtime import device
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.weights import fill
from fluxcli.models.checkpoints import resolve
from tests.engine.exact import error
from tests.engine.test_parity import records, run, worst
from tests.pipelines import DEEP, DEV, SCHNELL, TINY, Shape

# Of a block of diffusers' transformer: all matmuls, but for those that make modulations.
_LARGE = re.compile(r"(single_)?transformer_blocks\.\d+\.(?!norm)")


def in_8_bits(x: Tensor) -> Tensor:
    """Row by row to e4m3 and back."""
    scale = x.float().abs().amax(-1, keepdim=True).clip(min=1e-30) * (1 / 448)
    return (x.float() * (1 / scale)).to(torch.float8_e4m3fn).to(x.dtype) * scale


class In8Bits(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(in_8_bits(x), in_8_bits(self.weight), self.bias)


def engine(directory: Path, quantization: str = "fp8", compile: bool = False) -> Engine:
    return Engine(resolve(str(directory)), resolve_device("cpu", "float32", compile, "auto", quantization))


def inputs_of(flux: Flux, key: ShapeKey) -> Inputs:
    """Those of `Inputs`, in float64."""
    inputs = Inputs(flux, key, "cpu", "float32")
    inputs.img, inputs.t5, inputs.vec = (each.double() for each in (inputs.img, inputs.t5, inputs.vec))
    return inputs


def velocity(flux: Flux, key: ShapeKey) -> Tensor:
    inputs = inputs_of(flux, key)
    txt, steps = inputs.ours(flux, [0.7, 0.6])
    ids = inputs.ids
    step = Step(rope(ids, flux.config.axes_dims_rope, ROPE_THETA), sdpa)
    mod = steps[0].mod
    return flux.head(flux.body(flux.embed(inputs.img), txt, mod, step), mod)


@pytest.mark.parametrize("shape", [DEV, SCHNELL, DEEP], ids=lambda shape: shape.name)
def test_a_step_is_that_of_diffusers_on_numbers_in_8_bits(shape: Shape, pipeline) -> None:
    """In float64: in float32 the order of a sum decides about the last of the 8 bits now and then, and a few blocks
    later about all of them."""
    checkpoint = resolve(str(pipeline(shape)))
    key = ShapeKey(2, 64, 80, 16)
    results = {}
    for fp8 in (True, False):
        with fill.load_transformer(checkpoint, "cpu", torch.float64, Reference(), fp8) as flux:
            pass
        results[fp8] = velocity(flux, key)
    inputs = inputs_of(flux, key)
    twin = peers.twin(flux, checkpoint.transformer)
    plain = twin(**inputs.diffusers(inputs.img, 0.7))[0]
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and _LARGE.match(name):
            module.__class__ = In8Bits
    eight = twin(**inputs.diffusers(inputs.img, 0.7))[0]
    assert error(results[False], plain) < 1e-6
    assert error(eight, plain) > 0.01, "a reference that changes nothing would prove nothing"
    assert error(results[True], eight) < 1e-4


def with_threads(count: int, run: Callable[[], np.ndarray]) -> np.ndarray:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_image_is_that_of_its_row_alone(compile: bool, pipeline) -> None:
    directory = pipeline(DEEP)
    rows = records(DEEP, 3, 80, 64, 16, steps=2)
    made = engine(directory, compile=compile)
    together = run(made, rows)
    assert worst(together, run(made, rows[::-1])[::-1]) <= 1
    assert worst(together, np.concatenate([run(made, [row]) for row in rows])) <= 1
    assert worst(together, run(engine(directory, "none"), rows)) > 5, "in 8 bits it is another image"
    assert made.flux.double_blocks[0].img_mlp.up.weight.dtype == torch.float8_e4m3fn


def test_an_image_is_the_same_on_any_number_of_cores() -> None:
    rows = records(None, 1, 128, 128, 64, steps=3)
    made = [with_threads(count, lambda: run(engine(TINY), rows)) for count in (1, 2, 3)]
    assert max(worst(made[0], other) for other in made[1:]) <= 1


def test_a_gpu_without_fp8_is_refused_before_anything_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        DeviceError, match=r"--quantization fp8: NVIDIA A100 has no matmuls of 8-bit.*quantization none"
    ):
        resolve_device("cuda", "auto", None, "auto", "fp8")
    assert resolve_device("cuda", "auto", None, "auto").quantization == "none"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert resolve_device("cuda", "auto", None, "auto", "fp8").fp8
    with pytest.raises(DeviceError, match="goes with --dtype bfloat16, not float16"):
        resolve_device("cuda", "float16", None, "auto", "fp8")


def test_the_memory_of_8_bits_is_what_is_planned_with(pipeline) -> None:
    checkpoint = resolve("random:flux-dev")
    whole, eight = (fill.size(checkpoint, "transformer", torch.bfloat16, fp8) for fp8 in (False, True))
    # 8.6 of the 11.9 billion weights are in the blocks: a byte less each, and four for each output's scale.
    blocks = 19 * 2 * (3072 * 3072 * (3 + 1 + 4 + 4)) + 38 * (3072 * 3072 * (7 + 5))
    outputs = 19 * 2 * 3072 * (3 + 1 + 4 + 1) + 38 * 3072 * (7 + 1)
    assert eight == whole - blocks + 4 * outputs
    small = resolve(str(pipeline(DEV)))
    assert fill.size(small, "transformer", torch.bfloat16, True) < fill.size(small, "transformer", torch.bfloat16)
    gpu = EngineConfig("cuda:0", "bfloat16", True, quantization="fp8")
    one = ShapeKey(1, 1024, 1024, 512)
    planned = memory.plan(checkpoint, gpu, [one], int(24e9))
    assert planned.visiting_text and planned.needed < 24e9
    with pytest.raises(OutOfMemory, match="in bfloat16"):
        memory.plan(checkpoint, replace(gpu, quantization="none"), [one], int(24e9))
    with pytest.raises(OutOfMemory, match="in fp8"):
        memory.plan(checkpoint, gpu, [one], int(12e9))
