"""GroupNorm with SiLU, and the sum of a residual block, equal their plain references."""

import pytest
import torch

from fluxcli.engine.layers.groupnorm import add_biased, group_norm_silu
from tests.engine.exact import DTYPES, TOLERANCE, error, exact, on_gpu

SHAPES = pytest.mark.parametrize(
    ("shape", "groups"), [((1, 256, 256, 256), 32), ((2, 512, 50, 74), 32), ((3, 24, 18, 10), 8)], ids=str
)


def images(shape: tuple[int, ...], device: str, dtype: torch.dtype):
    """Channels-last, far from zero: a mean that squares would drown in."""
    x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last) + 8
    weight, bias, before = (torch.randn(shape[1], device=device).to(dtype) for _ in range(3))
    return x, weight, bias, before


def check(given, groups: int, dtype: torch.dtype, fused) -> None:
    x, weight, bias, before = given
    for added in (None, before):
        ours = fused(x, weight, bias, groups, 1e-6, added)
        theirs = group_norm_silu(*map(exact, (x, weight, bias)), groups, 1e-6, None if added is None else exact(added))
        assert ours.stride() == x.stride()
        assert error(ours, theirs) < 2 * TOLERANCE[dtype]


def check_sum(given, dtype: torch.dtype, fused) -> None:
    added = given[0], given[0].flip(2).contiguous(memory_format=torch.channels_last), given[1]
    assert error(fused(*added), add_biased(*map(exact, added))) < TOLERANCE[dtype]


@on_gpu
@SHAPES
@DTYPES
def test_group_norm_with_silu(dtype: torch.dtype, shape, groups: int) -> None:
    torch.manual_seed(0)
    check(images(shape, "cuda", dtype), groups, dtype, group_norm_silu)


@on_gpu
@SHAPES
@DTYPES
def test_adding_with_a_bias(dtype: torch.dtype, shape, groups: int) -> None:
    torch.manual_seed(0)
    check_sum(images(shape, "cuda", dtype), dtype, add_biased)
