"""Layers over one input, over two, and of two streams: each is what its parts are one by one."""

import pytest
import torch
import torch.nn.functional as F

from fluxcli.engine.layers.linear import MLP, Linear, LinearOfTwo, LinearToTwo, joined
from fluxcli.engine.layers.scaling import BeforeGelu
from fluxcli.engine.matmul.matmul import Matmul
from fluxcli.engine.matmul.scaled import Scaled, row_scaled, store
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.runtime.tuner import Tuner
from tests.engine.exact import DTYPES, TOLERANCE, error, exact, on_gpu


def filled(layer: Linear, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Linear:
    layer.to(device, dtype)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return layer


def test_one_layer_over_two_inputs() -> None:
    layer = filled(LinearOfTwo(480, 96, Reference()))
    a, b = torch.randn(2, 65, 96), torch.randn(2, 65, 384)
    whole = F.linear(torch.cat((a, b), dim=-1), layer.weight, layer.bias)
    assert torch.allclose(layer(a, b), whole, atol=1e-5)


def test_two_layers_over_one_input() -> None:
    layer = filled(LinearToTwo(96, 288, 384, Reference()))
    x = torch.randn(2, 65, 96)
    whole = F.linear(x, layer.weight, layer.bias)
    first, second = layer(x)
    assert torch.allclose(first, whole[..., :288], atol=1e-5)
    assert torch.allclose(second, F.gelu(whole[..., 288:], approximate="tanh"), atol=1e-5)


def test_streams_keep_their_own_layers_and_lie_side_by_side() -> None:
    layers = [filled(Linear(96, 192, Reference())) for _ in range(2)]
    inputs = [torch.randn(2, tokens, 96) for tokens in (65, 33)]
    expected = torch.cat([F.linear(x, each.weight, each.bias) for each, x in zip(layers, inputs, strict=True)], dim=1)
    assert torch.equal(joined(layers, inputs), expected)


def fp8(layer: Linear) -> Linear:
    """Filled, in 8 bits."""
    layer.bias.data.copy_(torch.randn(layer.bias.shape))
    slot = layer.slot(0, len(layer.weight))
    assert isinstance(slot, Scaled)
    store(slot, torch.randn(slot.values.shape) * slot.values.shape[-1] ** -0.5)
    return layer


def eight(x: torch.Tensor) -> torch.Tensor:
    return row_scaled(x).wide()


def through(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(eight(x), layer.slot(0, len(layer.weight)).wide(), layer.bias)


def test_layers_in_8_bits_are_their_parts_on_numbers_in_8_bits() -> None:
    torch.manual_seed(0)
    x, y, wide = torch.randn(2, 65, 96), torch.randn(2, 33, 96), torch.randn(2, 65, 384)
    close = {"rtol": 1e-4, "atol": 1e-4}

    mlp = MLP(96, 384, Reference(), fp8=True)
    fp8(mlp.up), fp8(mlp.down)
    curved = F.gelu(through(mlp.up, x), approximate="tanh")
    assert torch.allclose(mlp(x), through(mlp.down, curved), **close)
    assert torch.allclose(mlp(row_scaled(x)), mlp(x), **close)

    two = fp8(LinearToTwo(96, 288, 384, Reference(), fp8=True))
    first, second = two(x)
    assert isinstance(second, BeforeGelu)
    assert torch.allclose(torch.cat((first, second.x), dim=-1), through(two, x), **close)

    of_two = fp8(LinearOfTwo(480, 96, Reference(), fp8=True))
    beside = torch.cat((x, F.gelu(wide, approximate="tanh")), dim=-1)
    assert torch.allclose(of_two(x, BeforeGelu(wide)), through(of_two, beside), **close)

    layers = [fp8(Linear(96, 192, Reference(), fp8=True)) for _ in range(2)]
    expected = torch.cat([through(layer, each) for layer, each in zip(layers, (x, y), strict=True)], dim=1)
    assert torch.allclose(joined(layers, [row_scaled(x), y]), expected, **close)


@on_gpu
@DTYPES
def test_all_of_them_on_cuda(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    multiply = Matmul(Tuner("cuda:0"), "cuda:0")
    x, y, wide = (torch.randn(2, rows, dim).to("cuda", dtype) for rows, dim in ((65, 96), (33, 96), (65, 384)))
    cases = [
        (filled(LinearOfTwo(480, 96, multiply), "cuda", dtype), (x, wide)),
        (filled(LinearToTwo(96, 288, 384, multiply), "cuda", dtype), (x,)),
        (filled(MLP(96, 384, multiply), "cuda", dtype), (x,)),
    ]
    for layer, given in cases:
        ours = layer(*given)
        theirs = on_host(layer)(*map(exact, given))
        for one, other in zip(_tuple(ours), _tuple(theirs), strict=True):
            assert error(one, other) < 2 * TOLERANCE[dtype]
    layers = [filled(Linear(96, 192, multiply), "cuda", dtype) for _ in range(2)]
    ours = joined(layers, [x, y])
    theirs = joined([on_host(layer) for layer in layers], [exact(x), exact(y)])
    assert error(ours, theirs) < 2 * TOLERANCE[dtype]


def on_host(layer):
    """The same layer in float64, by the reference."""
    for module in layer.modules():
        if isinstance(module, Linear):
            module._multiply = Reference()
    return exact(layer)


def _tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_what_is_not_given_is_not_guessed() -> None:
    with pytest.raises(TypeError):
        Linear(8, 8)  # who multiplies
