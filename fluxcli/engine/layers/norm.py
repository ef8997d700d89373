"""Adaptive LayerNorm: the norm before every attention and MLP, modulated by the timestep, guidance and text."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine.matmul.scaled import Scaled, row_scaled

NORM_EPS = 1e-6  # of every LayerNorm and RMSNorm in FLUX.1
HALF_MAX = 65504.0  # the largest float16; the residual stream of FLUX leaves it now and then, and is clipped


class Modulation(NamedTuple):
    """What one norm, and the update that follows from it, are modulated by: [B, D] each. The last norm has no gate."""

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None


def add_and_modulate(
    x: Tensor, gate: Tensor | None, update: Tensor | None, shift: Tensor, scale: Tensor, fp8: bool = False
) -> tuple[Tensor, Tensor | Scaled]:
    """The sum x + gate * update, or x where neither is given; and its LayerNorm, without weights, times 1 + scale, plus
    shift.

    Args:
        x, update: [B, S, D], of any strides between tokens and batches.
        gate, shift, scale: [B, D], of any stride between batches.
        fp8: the norm is to be in 8 bits, a scale for each token.

    Returns:
        Both [B, S, D]; the sum is x itself where nothing is added.
    """
    if x.is_cuda:
        from fluxcli.engine.layers import norm_triton

        return norm_triton.add_and_modulate(x, gate, update, shift, scale, NORM_EPS, HALF_MAX, fp8)
    if gate is not None and update is not None:
        x = gated_sum(x, gate, update)
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale[:, None]) + shift[:, None]
    return x, row_scaled(normed) if fp8 else normed


def gated_sum(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update. x, update [B, S, D], gate [B, D]."""
    total = x + gate[:, None] * update
    return total.clip(-HALF_MAX, HALF_MAX) if total.dtype == torch.float16 else total
