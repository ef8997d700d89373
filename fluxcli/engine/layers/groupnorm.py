"""What lies between the convolutions of the VAE: GroupNorm with SiLU, and the sum of a residual block."""

import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, before: Tensor | None = None
) -> Tensor:
    """SiLU of the GroupNorm of x, or of x + `before`: the bias of the convolution that made x.

    x [B, C, H, W], channels-last on CUDA; weight, bias, before [C] -> like x.
    """
    if x.is_cuda:
        from fluxcli.engine.layers import groupnorm_triton

        return groupnorm_triton.group_norm_silu(x, weight, bias, groups, eps, before)
    if before is not None:
        x = x + before[:, None, None]
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def add_biased(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias; x, y [B, C, H, W], both channels-last on CUDA; bias [C]."""
    if x.is_cuda:
        from fluxcli.engine.layers import groupnorm_triton

        return groupnorm_triton.add_biased(x, y, bias)
    return x + y + bias[:, None, None]
