"""Each fused kernel equals its plain torch reference, on random data, at the dtype's tolerance.

On a GPU the kernels themselves run; elsewhere Triton's interpreter runs them, where Triton is installed.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fluxcli.engine.layers import ops
from fluxcli.engine.layers.residual import Pending

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
DUAL, SINGLE, SMALL = ((512, 4096), 24, (16, 56, 56)), ((608,), 24, (16, 56, 56)), ((16, 24), 3, (8, 12, 12))


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()).item()


def stream(batch: int, tokens: int, dim: int, pending: bool, device: str, dtype: torch.dtype):
    """A stream whose rows lie between others, as after `tail`, with its modulations."""
    x, update = (torch.randn(batch, tokens + 3, dim, device=device).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(batch, 5, dim, device=device).to(dtype).unbind(1)[:3]
    whole = Pending(x, gate, update) if pending else Pending(x)
    return whole.tail(3), shift, scale


def heads(tokens: tuple[int, ...], heads: int, axes: tuple[int, ...], apart: bool, device: str, dtype: torch.dtype):
    """q, k and v of every token, where `apart` between what belongs to others, with all that turns them."""
    head_dim = sum(axes)
    ids = torch.randint(0, 64, (sum(tokens), 3), device=device)
    width = 3 * heads * head_dim
    qkv = torch.randn(2, sum(tokens), width + 64 * apart, device=device).to(dtype)[..., :width]
    norms = [[torch.rand(head_dim, device=device).to(dtype) + 0.5 for _ in tokens] for _ in range(2)]
    return qkv, list(tokens), *norms, *ops.rope(ids, axes, 10_000)


def exact(x):
    """The same argument in float64 on the host, where the reference runs."""
    if isinstance(x, Tensor):
        return x.double().cpu()
    if isinstance(x, Pending):
        return Pending(*(None if each is None else exact(each) for each in x))
    return type(x)(map(exact, x)) if isinstance(x, list | tuple) else x


def check_add_and_modulate(given, dtype: torch.dtype, fused) -> None:
    for ours, theirs in zip(fused(*given), ops.add_and_modulate(*map(exact, given)), strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype]


def check_qk_norm_rope(given, dtype: torch.dtype, fused) -> None:
    theirs = ops.qk_norm_rope(*map(exact, given))
    ours = fused(*given)
    assert ours.shape == theirs.shape
    assert error(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("pending", [True, False], ids=["pending", "settled"])
@pytest.mark.parametrize("dim", [3072, 96])
@DTYPES
class TestAddAndModulate:
    pytestmark = gpu

    def test_equals_its_reference(self, dtype: torch.dtype, dim: int, pending: bool) -> None:
        torch.manual_seed(0)
        check_add_and_modulate(stream(2, 517, dim, pending, "cuda", dtype), dtype, ops.add_and_modulate)


@pytest.mark.parametrize("apart", [False, True], ids=["adjacent", "apart"])
@pytest.mark.parametrize("shape", [DUAL, SINGLE, SMALL], ids=["dual", "single", "small"])
@DTYPES
class TestQkNormRope:
    pytestmark = gpu

    def test_equals_its_reference(self, dtype: torch.dtype, shape, apart: bool) -> None:
        torch.manual_seed(0)
        check_qk_norm_rope(heads(*shape, apart, "cuda", dtype), dtype, ops.qk_norm_rope)


def pictures(shape: tuple[int, ...], device: str, dtype: torch.dtype):
    """Channels-last, far from zero: a mean that squares would drown in."""
    x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last) + 8
    weight, bias, before = (torch.randn(shape[1], device=device).to(dtype) for _ in range(3))
    return x, weight, bias, before


def check_group_norm_silu(given, groups: int, dtype: torch.dtype, fused) -> None:
    x, weight, bias, before = given
    for added in (None, before):
        ours = fused(x, weight, bias, groups, 1e-6, added)
        theirs = ops.group_norm_silu(
            *map(exact, (x, weight, bias)), groups, 1e-6, None if added is None else exact(added)
        )
        assert ours.stride() == x.stride()
        assert error(ours, theirs) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 256, 256, 256), 32), ((2, 512, 50, 74), 32), ((3, 24, 18, 10), 8)], ids=str
)
@DTYPES
class TestVae:
    pytestmark = gpu

    def test_group_norm_with_silu(self, dtype: torch.dtype, shape, groups: int) -> None:
        torch.manual_seed(0)
        check_group_norm_silu(pictures(shape, "cuda", dtype), groups, dtype, ops.group_norm_silu)

    def test_adding_with_a_bias(self, dtype: torch.dtype, shape, groups: int) -> None:
        torch.manual_seed(0)
        x, bias, _, _ = pictures(shape, "cuda", dtype)
        given = (x, x.flip(2).contiguous(memory_format=torch.channels_last), bias)
        assert error(ops.add_biased(*given), ops.add_biased(*map(exact, given))) < TOLERANCE[dtype]


def drawn(*shapes: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


PRODUCTS = {
    "linear_gelu": [(2, 65, 96), (384, 96), (384,)],
    "linear_and_gelu": [(2, 65, 96), (672, 96), (672,)],
    "linear_of_two": [(2, 65, 96), (2, 65, 384), (96, 480), (96,)],
}


@pytest.mark.parametrize("name", [*PRODUCTS, "linear_joined"])
@DTYPES
class TestProducts:
    pytestmark = gpu

    def test_equals_its_reference(self, dtype: torch.dtype, name: str) -> None:
        torch.manual_seed(0)
        if name == "linear_joined":
            a, b, *layers = drawn(
                (2, 65, 96), (2, 33, 96), (192, 96), (192,), (192, 96), (192,), device="cuda", dtype=dtype
            )
            given = [[a, b], [tuple(layers[:2]), tuple(layers[2:])]]
        else:
            given = drawn(*PRODUCTS[name], device="cuda", dtype=dtype) + ([288] if name == "linear_and_gelu" else [])
        ours, theirs = (getattr(ops, name)(*each) for each in (given, [exact(each) for each in given]))
        for one, other in zip(ours, theirs, strict=True):
            assert error(one, other) < 2 * TOLERANCE[dtype]


def test_float16_clips_what_it_cannot_hold() -> None:
    x, gate = torch.full((1, 2, 8), 60000.0, dtype=torch.float16), torch.ones(1, 8, dtype=torch.float16)
    assert (Pending(x, gate, x).settle() == 65504).all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_under_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported: hence a new process
    done = subprocess.run([sys.executable, "-m", "tests.engine.layers.test_ops"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def interpret() -> None:
    from fluxcli.engine.layers import kernels

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        for pending in (True, False):
            check_add_and_modulate(stream(2, 5, 96, pending, "cpu", dtype), dtype, kernels.add_and_modulate)
        for tokens, many, apart in (((3, 6), 3, False), ((4,), 8, True)):
            check_qk_norm_rope(heads(tokens, many, (8, 12, 12), apart, "cpu", dtype), dtype, kernels.qk_norm_rope)
        given = pictures((2, 24, 7, 9), "cpu", dtype)
        check_group_norm_silu(given, 8, dtype, kernels.group_norm_silu)
        added = given[0], given[0].flip(2).contiguous(memory_format=torch.channels_last), given[1]
        assert error(kernels.add_biased(*added), ops.add_biased(*map(exact, added))) < TOLERANCE[dtype]


def test_rotation_keeps_lengths_and_depends_on_relative_positions_only() -> None:
    ids = torch.arange(32)[:, None].expand(-1, 3)
    cos, sin = ops.rope(ids, (8, 12, 12), 10_000)
    x = torch.randn(1, 1, 1, 32).expand(1, 32, 1, 32)
    turned = ops._rotate(x, cos, sin)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    products = (turned[0, :, 0] @ turned[0, :, 0].T).diagonal(5)
    assert torch.allclose(products, products[:1].expand_as(products), rtol=1e-4)


def test_one_linear_layer_over_two_inputs() -> None:
    a, b, weight, bias = (torch.randn(shape) for shape in PRODUCTS["linear_of_two"])
    whole = torch.nn.functional.linear(torch.cat((a, b), dim=-1), weight, bias)
    assert torch.allclose(ops.linear_of_two(a, b, weight, bias), whole, atol=1e-4)


def test_two_linear_layers_over_one_input() -> None:
    x, weight, bias = (torch.randn(shape) for shape in PRODUCTS["linear_and_gelu"])
    first, second = ops.linear_and_gelu(x, weight, bias, 288)
    assert torch.allclose(first, ops.linear(x, weight[:288], bias[:288]), atol=1e-4)
    assert torch.allclose(second, ops.linear_gelu(x, weight[288:], bias[288:]), atol=1e-4)


if __name__ == "__main__":
    interpret()
