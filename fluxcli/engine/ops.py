"""The pieces of a FLUX block, its matrix products and what lies between them, and of the VAE's blocks.

Each is plain torch, which is the reference; on CUDA the fused kernel of the same name and signature in `kernels` runs,
or what `products` chose.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine import products

NORM_EPS = 1e-6  # of every LayerNorm and RMSNorm in FLUX.1
HALF_MAX = 65504.0  # the largest float16; the residual stream of FLUX leaves it now and then, and is clipped


class Pending(NamedTuple):
    """A stream [B, S, D] whose last update is still to be added: its value is x + gate * update.

    The next norm adds it on its way, so that the stream crosses memory once where it would twice. gate [B, D] and
    update [B, S, D] are None where nothing is pending.
    """

    x: Tensor
    gate: Tensor | None = None
    update: Tensor | None = None

    def tail(self, first: int) -> "Pending":
        """The tokens from `first` on."""
        return Pending(self.x[:, first:], self.gate, None if self.update is None else self.update[:, first:])

    def settle(self) -> Tensor:
        """The stream's value [B, S, D]."""
        if self.gate is None or self.update is None:
            return self.x
        total = self.x + self.gate[:, None] * self.update
        return total.clip(-HALF_MAX, HALF_MAX) if total.dtype == torch.float16 else total


def add_and_modulate(stream: Pending, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What is pending is added; then LayerNorm without weights, scale and shift.

    Args:
        stream: x may have any strides between tokens and batches; gate, shift and scale [B, D] share one batch stride.

    Returns:
        The stream's value [B, S, D], and its modulated norm [B, S, D].
    """
    if stream.x.is_cuda:
        from fluxcli.engine import kernels

        return kernels.add_and_modulate(stream, shift, scale)
    x = stream.settle()
    return x, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale[:, None]) + shift[:, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return products.linear(x, weight, bias) if x.is_cuda else F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, in its tanh form, of a linear layer. x [..., K], weight [N, K], bias [N] -> [..., N]."""
    if x.is_cuda:
        return products.linear(x, weight, bias, gelu=True)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_of_two(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer over two inputs side by side, without laying them there: the second product adds to the first.

    a [B, S, K1], b [B, S, K2], weight [N, K1 + K2], bias [N] -> [B, S, N].
    """
    first, second = weight.split((a.shape[-1], b.shape[-1]), dim=1)
    out = linear(a, first, bias)
    if a.is_cuda:
        return products.add_linear(out, b, second)
    out.flatten(0, 1).addmm_(b.flatten(0, 1), second.t())
    return out


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
        projections: each stream's q, k and v side by side, [B, S_i, 3D], contiguous; overwritten where there is one.
        norms_q, norms_k: each stream's RMSNorm weights [Dh].
        cos, sin: `rope` tables over the joint sequence, [S, Dh / 2] in float32.

    Returns:
        qkv [B, S, 3, H, Dh], contiguous.
    """
    head_dim = 2 * cos.shape[1]
    # The kernel's tiles are powers of two, as FLUX's heads of 128 are.
    if projections[0].is_cuda and head_dim & (head_dim - 1) == 0:
        from fluxcli.engine import kernels

        return kernels.qk_norm_rope(projections, norms_q, norms_k, cos, sin, heads)
    streams = []
    for projection, norm_q, norm_k in zip(projections, norms_q, norms_k, strict=True):
        q, k, v = projection.unflatten(-1, (3, heads, head_dim)).unbind(2)
        q, k = (F.rms_norm(x, w.shape, w, eps=NORM_EPS) for x, w in ((q, norm_q), (k, norm_k)))
        streams.append((q, k, v))
    q, k, v = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
    return torch.stack((_rotate(q, cos, sin), _rotate(k, cos, sin), v), dim=2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of each head by their position's angles, in float32. x [B, S, H, Dh]."""
    c, s = cos[None, :, None], sin[None, :, None]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2).to(x.dtype)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, before: Tensor | None = None
) -> Tensor:
    """SiLU of the GroupNorm of x, or of x + `before`: the bias of the convolution that made x.

    x [B, C, H, W], channels-last on CUDA; weight, bias, before [C] -> like x.
    """
    if x.is_cuda:
        from fluxcli.engine import kernels

        return kernels.group_norm_silu(x, weight, bias, groups, eps, before)
    if before is not None:
        x = x + before[:, None, None]
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def add_biased(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias; x, y [B, C, H, W], both channels-last on CUDA; bias [C]."""
    if x.is_cuda:
        from fluxcli.engine import kernels

        return kernels.add_biased(x, y, bias)
    return x + y + bias[:, None, None]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t [N] -> [N, dim] in float32, cosines first; the form of DDPM with period 10,000."""
    exponents = -math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angles = t.float()[:, None] * exponents.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
