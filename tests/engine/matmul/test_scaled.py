"""Numbers in 8 bits: how near they are, and that nothing makes a NaN of what is none."""

import pytest
import torch

from fluxcli.engine.matmul.scaled import E4M3, E4M3_MAX, Scaled, row_scaled, store
from tests.engine.exact import DTYPES


@DTYPES
def test_every_number_is_as_near_as_three_bits_of_mantissa_allow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 7, 96) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    made = row_scaled(x)
    assert made.values.dtype == E4M3 and made.scale.dtype == torch.float32 and made.scale.shape == (4, 7)
    assert (made.values.float().abs().amax(-1) == E4M3_MAX).all()  # all of the range is used
    least = made.scale[..., None] * 2.0**-10  # half the distance of numbers next to zero
    assert ((made.wide() - x.float()).abs() <= torch.maximum(x.float().abs() * 2.0**-4, least) * 1.001).all()


@DTYPES
def test_rows_of_zeros_and_infinities_make_no_nan(dtype: torch.dtype) -> None:
    x = torch.ones(4, 32, dtype=dtype)
    x[0] = 0
    x[1, 3], x[2, 5] = torch.inf, -torch.inf
    x[3] = torch.finfo(dtype).max
    made = row_scaled(x).wide()
    most = torch.finfo(dtype).max
    assert made.isfinite().all() and (made[0] == 0).all()
    for row, place, sign in ((1, 3, 1), (2, 5, -1), (3, 0, 1)):
        assert made[row, place].item() == pytest.approx(sign * most, rel=1e-6)


def test_a_nan_is_not_hidden() -> None:
    x = torch.ones(2, 32)
    x[0, 3] = torch.nan
    made = row_scaled(x).wide()
    assert made[0].isnan().any() and made[1].isfinite().all()


def test_what_is_stored_is_what_was_there_in_the_format_of_its_place() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 32)
    eight = row_scaled(x)
    other = Scaled(x.to(torch.float8_e5m2), torch.full((6,), 0.5))
    unscaled = x.to(E4M3)

    def stored(source: torch.Tensor | Scaled, dtype: torch.dtype | None = None) -> torch.Tensor | Scaled:
        target = (
            Scaled(torch.empty(6, 32, dtype=E4M3), torch.empty(6)) if dtype is None else torch.empty(6, 32).to(dtype)
        )
        store(target, source)
        return target

    def same(a: Scaled, b: Scaled) -> bool:
        return torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and torch.equal(a.scale, b.scale)

    assert torch.equal(stored(eight, torch.bfloat16), eight.wide().bfloat16())
    assert torch.equal(stored(unscaled, torch.float32), unscaled.float())
    assert same(stored(eight), eight)
    assert same(stored(unscaled), Scaled(unscaled, torch.ones(6)))
    assert same(stored(x), eight)
    assert same(stored(other), row_scaled(other.wide()))
