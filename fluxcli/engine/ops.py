"""The pieces of a FLUX block between its matrix products.

The elementwise ones are plain torch, which the compiler fuses. Where it does badly, a piece is an operator of its own:
a reference in plain torch, and on CUDA a kernel in `kernels` with the same signature.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6  # of every LayerNorm and RMSNorm in FLUX.1
GELU = "tanh"


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift. x [B, S, D]; shift, scale [B, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale[:, None]) + shift[:, None]


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


def qk_norm_rope(
    projections: list[Tensor], norms_q: list[Tensor], norms_k: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """RMSNorm and rotation of queries and keys, and the streams joined: all between projection and attention.

    Args:
        projections: each stream's projection [B, S_i, N], contiguous, q, k and v side by side in its first columns.
        norms_q, norms_k: each stream's RMSNorm weights [Dh].
        cos, sin: `rope` tables over the joint sequence, [S, Dh / 2] in float32.

    Returns:
        qkv [B, S, 3, H, Dh], contiguous.
    """
    head_dim = 2 * cos.shape[1]
    if projections[0].is_cuda and head_dim & (head_dim - 1) == 0:
        # Inductor makes four passes of it, 8.6 of 125 ms per step on an H200 at batch 1; this is one.
        return _fused_qk_norm_rope(projections, norms_q, norms_k, cos, sin, heads)
    streams = []
    for projection, norm_q, norm_k in zip(projections, norms_q, norms_k, strict=True):
        q, k, v = projection[..., : 3 * heads * head_dim].unflatten(-1, (3, heads, head_dim)).unbind(2)
        q, k = (F.rms_norm(x, w.shape, w, eps=NORM_EPS) for x, w in ((q, norm_q), (k, norm_k)))
        streams.append((q, k, v))
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
    return torch.stack((_rotate(q, cos, sin), _rotate(k, cos, sin), v), dim=2)


@torch.library.custom_op("fluxcli::qk_norm_rope", mutates_args=())
def _fused_qk_norm_rope(
    projections: list[Tensor], norms_q: list[Tensor], norms_k: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    from fluxcli.engine.kernels import qk_norm_rope

    return qk_norm_rope(projections, norms_q, norms_k, cos, sin, heads)


@_fused_qk_norm_rope.register_fake
def _(
    projections: list[Tensor], norms_q: list[Tensor], norms_k: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    return projections[0].new_empty(projections[0].shape[0], cos.shape[0], 3, heads, 2 * cos.shape[1])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of each head by their position's angles, in float32. x [B, S, H, Dh]."""
    c, s = cos[None, :, None], sin[None, :, None]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2).to(x.dtype)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t [N] -> [N, dim] in float32, cosines first; the form of DDPM with period 10,000."""
    exponents = -math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angles = t.float()[:, None] * exponents.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def finite_in_half(x: Tensor) -> Tensor:
    """Clips to what float16 holds; the residual stream of FLUX leaves it now and then."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
