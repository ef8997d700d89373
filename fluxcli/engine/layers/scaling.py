"""Activations in 8 bits: what a layer with 8-bit weights makes of its input.

Each is made where its rows cross memory anyway: by the norm (`norm.add_and_modulate`), or here together with the GELU
that is still to come and with what lies beside it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine.matmul.scaled import Scaled, bounded, row_scaled


class BeforeGelu(NamedTuple):
    """A tensor [..., K] whose GELU, in its tanh form, is still to come: the layer that takes it reads it anyway, to
    scale it."""

    x: Tensor


Input = Tensor | Scaled | BeforeGelu  # of a layer with 8-bit weights


def scaled(x: Input) -> Scaled:
    """[..., K] in 8 bits, a scale for each row."""
    if isinstance(x, Scaled):
        return x
    return _row_scaled(None, x.x) if isinstance(x, BeforeGelu) else _row_scaled(x, None)


def scaled_together(a: Tensor, b: BeforeGelu) -> Scaled:
    """a [..., K1] and, through its GELU, b [..., K2] side by side in 8 bits, [..., K1 + K2], with one scale for a row
    of both: e4m3 is a floating-point format, and loses no bits where the one is smaller than the other."""
    return _row_scaled(a, b.x)


def _row_scaled(plain: Tensor | None, curved: Tensor | None) -> Scaled:
    """Rows of `plain`, then rows of `curved` through GELU; both may lie apart."""
    parts = [each for each in (plain, curved) if each is not None]
    if parts[0].is_cuda:
        from fluxcli.engine.layers import scaling_triton

        return scaling_triton.row_scaled(plain, curved)
    if curved is not None:
        parts[-1] = F.gelu(bounded(curved), approximate="tanh")  # which makes NaN of an infinity
    return row_scaled(torch.cat(parts, dim=-1))
