"""What a step computes is counted right: against the layers that a step really calls, and torch's own counter."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fluxcli.bench import floor
from fluxcli.bench.inputs import Inputs
from fluxcli.core.records import ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.nets.flux1 import FluxConfig
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.models.checkpoints import resolve
from tests.pipelines import DEEP, DEV, SCHNELL, Shape

KEYS = [ShapeKey(1, 64, 64, 16), ShapeKey(3, 96, 64, 48)]
shapes = pytest.mark.parametrize("shape", [DEV, SCHNELL, DEEP], ids=lambda shape: shape.name)
keys = pytest.mark.parametrize("key", KEYS, ids=str)


@pytest.fixture
def engine(pipeline, shape: Shape) -> Engine:
    return Engine(resolve(str(pipeline(shape))), resolve_device("cpu", "float32", None, "auto"))


def counting() -> FlopCounterMode:
    """torch's counter; it knows no product in place."""

    def addmm_(total, x, weight, **rest) -> int:
        return 2 * x[0] * x[1] * weight[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


def one_step(engine: Engine, key: ShapeKey):
    """A call of nothing but the step."""
    inputs = Inputs(engine.flux, key, "cpu", "float32")
    with torch.inference_mode():
        txt, steps = inputs.ours(engine.flux, [0.9, 0.8])
    return lambda: engine.denoise(key, inputs.img, txt, steps)


class Products(TorchFunctionMode):
    """Writes down every product of a layer; what is added to the last one's result is a part of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[floor.Product] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight = args[:2]
            self.called.append(floor.Product(x.numel() // x.shape[-1], *reversed(weight.shape)))
        elif func is torch.Tensor.addmm_:
            x, weight = args[1:3]
            whole = self.called.pop()
            assert (whole.rows, whole.out_features) == (len(x), weight.shape[1])
            self.called.append(whole._replace(in_features=whole.in_features + x.shape[1]))
        return func(*args, **(kwargs or {}))


@shapes
@keys
def test_the_products_are_the_linear_layers_that_a_step_calls(engine: Engine, key: ShapeKey) -> None:
    run = one_step(engine, key)
    with Products() as products:
        run()
    assert len(products.called) > 5
    assert Counter(floor.products(engine.flux.config, key)) == Counter(products.called)


@shapes
@keys
def test_flops_are_what_torch_counts(engine: Engine, key: ShapeKey) -> None:
    run = one_step(engine, key)
    # The one attention on a CPU that torch's counter knows.
    with counting() as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    assert floor.flops(engine.flux.config, key) == counter.get_total_flops()


def test_flux_at_1024_has_the_arithmetic_it_is_known_for() -> None:
    config = FluxConfig.from_json(resolve("random:flux-dev").transformer)
    one = floor.flops(config, ShapeKey(1, 1024, 1024, 512))
    assert one == pytest.approx(74.4e12, rel=0.01)
    assert floor.flops(config, ShapeKey(16, 1024, 1024, 512)) == 16 * one


def test_the_floors_calls_do_the_work_that_is_counted() -> None:
    config, key = FluxConfig.from_json(resolve("tiny").transformer), ShapeKey(2, 64, 64, 64)
    runs = floor.products_run(config, key, "cpu", "float32"), floor.attention_run(config, key, "cpu", "float32", "sdpa")
    with counting() as counter, sdpa_kernel(SDPBackend.MATH):
        for run in runs:
            run()
    assert counter.get_total_flops() == floor.flops(config, key)


def test_the_floor_in_8_bits_does_the_same_products() -> None:
    config, key = FluxConfig.from_json(resolve("tiny").transformer), ShapeKey(2, 64, 64, 64)
    run = floor.products_run(config, key, "cpu", "bfloat16", fp8=True)
    with Calls() as calls:
        run()
    assert Counter(calls.products) == Counter(floor.products(config, key))
    assert calls.eight == len(calls.products) - 2


class Calls(TorchFunctionMode):
    """Rows, inputs and outputs of every product that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[floor.Product] = []
        self.eight = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.products.append(floor.Product(len(args[0]), *reversed(args[1].shape)))
        if func is torch._scaled_mm:
            self.products.append(floor.Product(len(args[0]), *args[1].shape))
            self.eight += 1
        return func(*args, **(kwargs or {}))
