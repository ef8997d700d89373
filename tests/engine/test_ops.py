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

from fluxcli.engine import ops
from fluxcli.engine.ops import Pending

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


def heads(tokens: tuple[int, ...], heads: int, axes: tuple[int, ...], device: str, dtype: torch.dtype):
    head_dim = sum(axes)
    ids = torch.randint(0, 64, (sum(tokens), 3), device=device)
    projections = [torch.randn(2, each, 3 * heads * head_dim, device=device).to(dtype) for each in tokens]
    norms = [[torch.rand(head_dim, device=device).to(dtype) + 0.5 for _ in tokens] for _ in range(2)]
    return projections, *norms, *ops.rope(ids, axes, 10_000), heads


def exact(x):
    """The same argument in float64 on the host, where the reference runs."""
    if isinstance(x, Tensor):
        return x.double().cpu()
    if isinstance(x, Pending):
        return Pending(*(None if each is None else exact(each) for each in x))
    return [exact(each) for each in x] if isinstance(x, list) else x


def check_add_and_modulate(given, dtype: torch.dtype, fused) -> None:
    for ours, theirs in zip(fused(*given), ops.add_and_modulate(*map(exact, given)), strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype]


def check_qk_norm_rope(given, dtype: torch.dtype, fused) -> None:
    theirs = ops.qk_norm_rope(*map(exact, given))
    ours = fused(*given)
    assert ours.is_contiguous() and ours.shape == theirs.shape
    assert error(ours, theirs) < TOLERANCE[dtype]


@pytest.mark.parametrize("pending", [True, False], ids=["pending", "settled"])
@pytest.mark.parametrize("dim", [3072, 96])
@DTYPES
class TestAddAndModulate:
    pytestmark = gpu

    def test_equals_its_reference(self, dtype: torch.dtype, dim: int, pending: bool) -> None:
        torch.manual_seed(0)
        check_add_and_modulate(stream(2, 517, dim, pending, "cuda", dtype), dtype, ops.add_and_modulate)


@pytest.mark.parametrize("shape", [DUAL, SINGLE, SMALL], ids=["dual", "single", "small"])
@DTYPES
class TestQkNormRope:
    pytestmark = gpu

    def test_equals_its_reference(self, dtype: torch.dtype, shape) -> None:
        torch.manual_seed(0)
        check_qk_norm_rope(heads(*shape, "cuda", dtype), dtype, ops.qk_norm_rope)


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


@DTYPES
class TestProducts:
    pytestmark = gpu

    def test_gelu_in_the_epilogue_is_the_tanh_form(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        x, weight, bias = 3 * torch.randn(2, 65, 96), torch.randn(384, 96) / 10, torch.randn(384)
        given = [each.to("cuda", dtype) for each in (x, weight, bias)]
        ours, theirs = ops.linear_gelu(*given), ops.linear_gelu(*map(exact, given))
        assert error(ours, theirs) < 2 * TOLERANCE[dtype]

    def test_two_inputs_side_by_side(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        given = [torch.randn(shape).to("cuda", dtype) for shape in ((2, 65, 96), (2, 65, 384), (96, 480), (96,))]
        assert error(ops.linear_of_two(*given), ops.linear_of_two(*map(exact, given))) < 2 * TOLERANCE[dtype]


def test_float16_clips_what_it_cannot_hold() -> None:
    x, gate = torch.full((1, 2, 8), 60000.0, dtype=torch.float16), torch.ones(1, 8, dtype=torch.float16)
    assert (Pending(x, gate, x).settle() == 65504).all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_under_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported: hence a new process
    done = subprocess.run([sys.executable, "-m", "tests.engine.test_ops"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def interpret() -> None:
    from fluxcli.engine import kernels

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        for pending in (True, False):
            check_add_and_modulate(stream(2, 5, 96, pending, "cpu", dtype), dtype, kernels.add_and_modulate)
        for tokens in ((3, 5), (4,)):
            check_qk_norm_rope(heads(tokens, 3, (8, 12, 12), "cpu", dtype), dtype, kernels.qk_norm_rope)
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
    a, b, weight, bias = torch.randn(2, 5, 8), torch.randn(2, 5, 24), torch.randn(8, 32), torch.randn(8)
    whole = torch.nn.functional.linear(torch.cat((a, b), dim=-1), weight, bias)
    assert torch.allclose(ops.linear_of_two(a, b, weight, bias), whole, atol=1e-5)


if __name__ == "__main__":
    interpret()
