"""The elementwise pieces of a FLUX block, in plain torch. On CUDA the compiler fuses them around the matrix
products."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6  # of every LayerNorm and RMSNorm in FLUX.1
GELU = "tanh"


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift. x [B, S, D]; shift, scale [B, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale[:, None]) + shift[:, None]


def qk_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over each head. x [B, S, H, Dh], weight [Dh]."""
    return F.rms_norm(x, weight.shape, weight, eps=NORM_EPS)


def rope(ids: Tensor, axes_dims: tuple[int, ...], theta: float) -> tuple[Tensor, Tensor]:
    """Rotary tables of positions. ids [S, axes] -> cos, sin [S, sum(axes_dims) / 2] in float32.

    Each axis turns its own share of the head, at angles id * theta^(-2i/dim); computed in float64 as FLUX does.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(torch.outer(ids[:, axis].double(), frequencies))
    joined = torch.cat(angles, dim=1)
    return joined.cos().float(), joined.sin().float()


def apply_rope(x: Tensor, pe: tuple[Tensor, Tensor]) -> Tensor:
    """Turns neighbouring pairs of each head by the angles in `pe`, in float32. x [B, S, H, Dh]."""
    cos, sin = (table[None, :, None] for table in pe)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t [N] -> [N, dim] in float32, cosines first; the form of DDPM with period 10,000."""
    exponents = -math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angles = t.float()[:, None] * exponents.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def finite_in_half(x: Tensor) -> Tensor:
    """Clips to what float16 holds; the residual stream of FLUX leaves it now and then."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
