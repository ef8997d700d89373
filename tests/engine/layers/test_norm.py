"""The modulated norm equals its plain reference, whatever lies around its tensors."""

import pytest
import torch
from torch import Tensor

from fluxcli.engine.layers.norm import HALF_MAX, Modulation, add_and_modulate
from fluxcli.engine.layers.residual import Residual
from tests.engine.exact import DTYPES, TOLERANCE, error, exact, on_gpu

Given = tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]


def given(batch: int, tokens: int, dim: int, pending: bool, device: str, dtype: torch.dtype) -> Given:
    """A stream whose rows lie between others, as after `tail`; gate, shift and scale from tensors of their own."""
    x, update = (torch.randn(batch, tokens + 3, dim, device=device).to(dtype)[:, 3:] for _ in range(2))
    gate = torch.randn(batch, 7, dim, device=device).to(dtype)[:, 2]
    shift = torch.randn(batch, 5, dim, device=device).to(dtype)[:, 1]
    scale = torch.randn(batch, dim, device=device).to(dtype)
    return x, gate if pending else None, update if pending else None, shift, scale


def check(given: Given, dtype: torch.dtype, fused) -> None:
    for ours, theirs in zip(fused(*given), add_and_modulate(*map(exact, given)), strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype]


@on_gpu
@pytest.mark.parametrize("pending", [True, False], ids=["pending", "settled"])
@pytest.mark.parametrize("dim", [3072, 96])
@DTYPES
def test_equals_its_reference(dtype: torch.dtype, dim: int, pending: bool) -> None:
    torch.manual_seed(0)
    check(given(2, 517, dim, pending, "cuda", dtype), dtype, add_and_modulate)


def test_a_residual_is_added_by_the_next_norm() -> None:
    torch.manual_seed(0)
    x, gate, update, shift, scale = given(2, 5, 8, True, "cpu", torch.float32)
    stream = Residual(x).add(gate, update)
    settled, normed = stream.norm(Modulation(shift, scale), fp8=False)
    assert torch.equal(settled.x, stream.value()) and settled.update is None
    assert torch.equal(normed, add_and_modulate(stream.value(), None, None, shift, scale)[1])
    assert torch.equal(stream.tail(2).value(), stream.value()[:, 2:])


def test_an_update_that_would_be_lost_is_refused() -> None:
    x = torch.zeros(1, 2, 4)
    with pytest.raises(AssertionError, match="lost"):
        Residual(x).add(x[:, 0], x).add(x[:, 0], x)


def test_float16_clips_what_it_cannot_hold() -> None:
    x, gate = torch.full((1, 2, 8), 60000.0, dtype=torch.float16), torch.ones(1, 8, dtype=torch.float16)
    assert (Residual(x, gate, x).value() == HALF_MAX).all()
