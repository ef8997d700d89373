"""Activations in 8 bits are what the plain functions make of them, whatever lies around and beside them."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine.layers.norm import add_and_modulate
from fluxcli.engine.layers.scaling import BeforeGelu, _row_scaled, scaled, scaled_together
from fluxcli.engine.matmul.scaled import E4M3_MAX, Scaled, bounded
from tests.engine.exact import DTYPES, exact, on_gpu
from tests.engine.layers import test_norm as norm

Parts = tuple[Tensor | None, Tensor | None]
PARTS = ["plain", "curved", "both"]


def given(parts: str, device: str, dtype: torch.dtype, dims: tuple[int, int] = (96, 160)) -> Parts:
    """Parts of wider tensors, as a layer's results are."""
    a, b = (torch.randn(2, 5, dim + 32, device=device).mul(3).to(dtype)[..., 32:] for dim in dims)
    return (None if parts == "curved" else a, None if parts == "plain" else b)


ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of what a norm adds up before it


def near(made: Scaled, x: Tensor, dtype: torch.dtype) -> None:
    """Whether `made` is x, in float64, to the precision of e4m3 and of `dtype`."""
    largest = bounded(x).abs().amax(-1)
    scale, rounding = largest / E4M3_MAX, ROUNDING[dtype]
    assert torch.allclose(made.scale.double().cpu(), scale, rtol=rounding)
    off, least = (made.wide().double().cpu() - x).abs(), scale[..., None] * 2.0**-10
    allowed = torch.maximum(x.abs() * 2.0**-4, least) * 1.01 + rounding * largest[..., None]
    if os.environ.get("TRITON_INTERPRET"):  # it rounds the smallest down, and forgets to carry into the exponent
        allowed = torch.maximum(allowed, 2 * least)
        off[(x / scale[..., None]).abs().frexp()[0] > 0.96] = 0
    assert (off <= allowed).all()


def check(parts: Parts, fused: Callable[[Tensor | None, Tensor | None], Scaled]) -> None:
    plain, curved = map(exact, parts)
    whole = [plain, None if curved is None else F.gelu(curved, approximate="tanh")]
    dtype = next(each.dtype for each in parts if each is not None)
    near(fused(*parts), torch.cat([each for each in whole if each is not None], dim=-1), dtype)


def check_norm(given: norm.Given, fused: Callable[..., tuple[Tensor, Tensor | Scaled]]) -> None:
    total, made = fused(*given, fp8=True)
    plain, _ = fused(*given, fp8=False)
    assert torch.equal(total, plain) and isinstance(made, Scaled)
    near(made, add_and_modulate(*map(exact, given))[1], given[0].dtype)


def check_odd_numbers(device: str, dtype: torch.dtype, fused: Callable[[Tensor | None, Tensor | None], Scaled]) -> None:
    x = torch.ones(1, 4, 32, device=device, dtype=dtype)
    x[0, 0], x[0, 1, 3], x[0, 2, 5], x[0, 3, 7] = 0, torch.inf, -torch.inf, torch.nan
    for parts in ((x, None), (None, x), (x, x)):
        made = fused(*parts).wide()
        assert made[:, :3].isfinite().all() and (made[:, 0] == 0).all() and made[:, 3].isnan().any()


@pytest.mark.parametrize("parts", PARTS)
@DTYPES
def test_plain_and_curved_rows_lie_side_by_side(dtype: torch.dtype, parts: str) -> None:
    torch.manual_seed(0)
    check(given(parts, "cpu", dtype), _row_scaled)
    check_odd_numbers("cpu", dtype, _row_scaled)


def test_what_is_in_8_bits_already_stays_as_it_is() -> None:
    a, b = (torch.randn(1, 3, 32) for _ in "ab")
    once = scaled(a)
    assert scaled(once) is once
    both = scaled_together(a, BeforeGelu(b))
    curved = scaled(BeforeGelu(b))
    assert both.values.shape == (1, 3, 64) and torch.equal(both.scale, torch.maximum(once.scale, curved.scale))


def test_a_norm_in_8_bits() -> None:
    torch.manual_seed(0)
    for pending in (True, False):
        check_norm(norm.given(2, 5, 96, pending, "cpu", torch.float32), add_and_modulate)


@on_gpu
@pytest.mark.parametrize("parts", PARTS)
def test_all_of_it_on_cuda(parts: str) -> None:
    torch.manual_seed(0)
    check(given(parts, "cuda", torch.bfloat16, (3072, 12288)), _row_scaled)
    check_odd_numbers("cuda", torch.bfloat16, _row_scaled)
    for pending in (True, False):
        check_norm(norm.given(2, 517, 3072, pending, "cuda", torch.bfloat16), add_and_modulate)
