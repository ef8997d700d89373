"""diffusers over the very tensors of ours: shared, the same result, and float32 without a second model."""

import sys
from types import ModuleType

import pytest
import torch

from fluxcli.bench import peers
from fluxcli.bench.inputs import Inputs
from fluxcli.bench.parity import parity
from fluxcli.core.records import ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.matmul.scaled import row_scaled
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.models.checkpoints import resolve
from tests.pipelines import DEV, SCHNELL, Shape

KEY = ShapeKey(2, 64, 96, 32)
both = pytest.mark.parametrize("shape", [DEV, SCHNELL], ids=lambda shape: shape.name)


def engine_of(directory, dtype: str = "float32") -> Engine:
    with torch.inference_mode(False):  # weights are read by threads of their own, which no mode reaches
        return Engine(resolve(str(directory)), resolve_device("cpu", dtype, None, "auto"))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@both
def test_a_peers_tensors_are_ours_and_not_copies(pipeline, shape: Shape) -> None:
    directory = pipeline(shape)
    engine = engine_of(directory)
    model = peers.twin(engine.flux, resolve(str(directory)).transformer)
    ours = {name: slot.data_ptr() for name, slot in engine.flux.slots()}
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == ours
    assert not list(model.buffers())


@both
def test_a_peers_step_is_ours(pipeline, shape: Shape) -> None:
    directory = pipeline(shape)
    engine = engine_of(directory)
    peer = peers.Diffusers(engine.flux, resolve(str(directory)).transformer, compiled=False)
    assert peer.attend({}) == "native"
    inputs = Inputs(engine.flux, KEY, "cpu", "float32")
    txt, steps = inputs.ours(engine.flux, [0.9, 0.6])
    ours = engine.denoise(KEY, inputs.img, txt, steps)
    theirs = peer.step(inputs, 0.9, torch.tensor(-0.3))()
    assert (ours - inputs.img).norm() > 0.1 * inputs.img.norm()
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_compiled_blocks_get_the_fastest_attention_that_diffusers_has_too(pipeline) -> None:
    directory = pipeline(DEV)
    peer = peers.Diffusers(engine_of(directory).flux, resolve(str(directory)).transformer, compiled=True)
    assert peer.attend({"fa4": 1.0, "sdpa": 2.0, "fa3": 1.5}) == "native"


def test_float32_widens_each_weight_when_it_is_used(pipeline) -> None:
    directory = pipeline(DEV)
    engine, transformer = engine_of(directory, "bfloat16"), resolve(str(directory)).transformer
    inputs = Inputs(engine.flux, KEY, "cpu", "bfloat16")
    model = peers.in_float32(peers.twin(engine.flux, transformer))
    made = peers.denoise(model, inputs, [1.0, 0.5, 0.0], torch.float32)
    copy = peers.twin(engine.flux, transformer).to(torch.float32)
    assert torch.equal(made, peers.denoise(copy, inputs, [1.0, 0.5, 0.0], torch.float32))
    held = {parameter.data_ptr() for parameter in model.parameters()}
    assert held == {slot.data_ptr() for _, slot in engine.flux.slots()}


@both
def test_parity_sees_equality_in_float32_and_rounding_in_bfloat16(pipeline, shape: Shape) -> None:
    directory = pipeline(shape)
    transformer = resolve(str(directory)).transformer
    engine = engine_of(directory)
    same = parity(engine, engine.flux, transformer, KEY)
    assert same["ours_to_diffusers"] < 1e-4 < 0.1 < same["change_by_denoising"]
    assert same["diffusers_to_float32"] == 0
    engine = engine_of(directory, "bfloat16")
    rounded = parity(engine, engine.flux, transformer, KEY)
    assert 1e-3 < rounded["ours_to_float32"] <= 1.2 * rounded["diffusers_to_float32"] + 1e-2


def test_torchao_gets_a_model_of_its_own_in_8_bits(pipeline, monkeypatch) -> None:
    """As far as a CPU shows: with a stand-in, which rounds where the package would."""
    directory = pipeline(DEV)
    transformer, engine = resolve(str(directory)).transformer, engine_of(directory)
    asked = []

    def quantize_(model, config) -> None:
        asked.append(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(row_scaled(module.weight).wide(), requires_grad=False)

    package = ModuleType("torchao.quantization")
    package.quantize_, package.PerRow = quantize_, lambda: "per row"
    package.Float8DynamicActivationFloat8WeightConfig = lambda granularity: granularity
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", package)
    peer = peers.Torchao(engine.flux, transformer, compiled=False)
    assert asked == ["per row"]
    found = parity(engine, engine.flux, transformer, KEY, 2, {"torchao": peer})
    assert found["ours_to_diffusers"] < 1e-4 and found["torchao_to_float32"] > 1e-3 and found["steps"] == 2


def test_parity_sees_a_weight_that_is_wrong(pipeline, monkeypatch) -> None:
    directory = pipeline(DEV)
    transformer = resolve(str(directory)).transformer
    engine = engine_of(directory)
    twin = peers.twin

    def wrong(flux, config):
        model = twin(flux, config)
        model.proj_out.bias = torch.nn.Parameter(model.proj_out.bias + 0.5, requires_grad=False)
        return model

    monkeypatch.setattr(peers, "twin", wrong)
    assert parity(engine, engine.flux, transformer, KEY)["ours_to_diffusers"] > 0.05
