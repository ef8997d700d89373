"""The pieces of a FLUX block, its matrix products and what lies between them, and of the VAE's blocks.

Each is plain torch, which is the reference; on CUDA the fused kernel of the same name and signature in `kernels` runs,
or what `products` chose.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine.layers.residual import Pending
from fluxcli.engine.matmul import products

NORM_EPS = 1e-6  # of every LayerNorm and RMSNorm in FLUX.1


def add_and_modulate(stream: Pending, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What is pending is added; then LayerNorm without weights, scale and shift.

    Args:
        stream: x may have any strides between tokens and batches; gate, shift and scale [B, D] share one batch stride.

    Returns:
        The stream's value [B, S, D], and its modulated norm [B, S, D].
    """
    if stream.x.is_cuda:
        from fluxcli.engine.layers import kernels

        return kernels.add_and_modulate(stream, shift, scale)
    x = stream.settle()
    return x, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale[:, None]) + shift[:, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return products.linear(x, weight, bias) if x.is_cuda else F.linear(x, weight, bias)


def linear_joined(streams: list[Tensor], layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Each stream through a linear layer of its own, the results joined along the tokens.

    streams [B, S_i, K], layers of weight [N, K] and bias [N] -> [B, S, N].
    """
    if not streams[0].is_cuda:
        return torch.cat([F.linear(x, *layer) for x, layer in zip(streams, layers, strict=True)], dim=1)
    lengths = [x.shape[1] for x in streams]
    joined = streams[0].new_empty(len(streams[0]), sum(lengths), len(layers[0][0]))
    for x, layer, out in zip(streams, layers, joined.split(lengths, dim=1), strict=True):
        products.linear(x, *layer, out=out)
    return joined


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU, in its tanh form, of a linear layer. x [..., K], weight [N, K], bias [N] -> [..., N]."""
    if x.is_cuda:
        return products.linear(x, weight, bias, gelu=True)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_and_gelu(x: Tensor, weight: Tensor, bias: Tensor, plain: int) -> tuple[Tensor, Tensor]:
    """Two linear layers over one input, the first of `plain` outputs, the second through GELU in its tanh form.

    x [..., K], weight [N, K], bias [N] -> [..., plain], [..., N - plain], whose rows may lie apart.
    """
    if x.is_cuda:
        return products.linear_and_gelu(x, weight, bias, plain)
    return F.linear(x, weight[:plain], bias[:plain]), linear_gelu(x, weight[plain:], bias[plain:])


def linear_of_two(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer over two inputs side by side, without laying them there: the second product adds to the first.

    a [B, S, K1], b [B, S, K2], weight [N, K1 + K2], bias [N] -> [B, S, N].
    """
    first, second = weight.split((a.shape[-1], b.shape[-1]), dim=1)
    out = linear(a, first, bias)
    if out.is_cuda:
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
    qkv: Tensor, lengths: list[int], norms_q: list[Tensor], norms_k: list[Tensor], cos: Tensor, sin: Tensor
) -> Tensor:
    """RMSNorm and rotation of queries and keys: all between projection and attention.

    Args:
        qkv: q, k and v of every token side by side, [B, S, 3D], whose rows may lie apart; overwritten on CUDA.
        lengths: tokens of each stream, one or two.
        norms_q, norms_k: each stream's RMSNorm weights [Dh].
        cos, sin: `rope` tables, [S, Dh / 2] in float32.

    Returns:
        [B, S, 3, H, Dh].
    """
    head_dim = 2 * cos.shape[1]
    # The kernel's tiles are powers of two, as FLUX's heads of 128 are.
    if qkv.is_cuda and head_dim & (head_dim - 1) == 0:
        from fluxcli.engine.layers import kernels

        return kernels.qk_norm_rope(qkv, lengths, norms_q, norms_k, cos, sin)
    parts, heads = [], qkv.unflatten(-1, (3, -1, head_dim))
    for part, *norms in zip(heads.split(lengths, dim=1), norms_q, norms_k, strict=True):
        q, k, v = part.unbind(2)
        q, k = (F.rms_norm(x, norm.shape, norm, eps=NORM_EPS) for x, norm in zip((q, k), norms, strict=True))
        parts.append((q, k, v))
    q, k, v = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
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
        from fluxcli.engine.layers import kernels

        return kernels.group_norm_silu(x, weight, bias, groups, eps, before)
    if before is not None:
        x = x + before[:, None, None]
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


def add_biased(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias; x, y [B, C, H, W], both channels-last on CUDA; bias [C]."""
    if x.is_cuda:
        from fluxcli.engine.layers import kernels

        return kernels.add_biased(x, y, bias)
    return x + y + bias[:, None, None]


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t [N] -> [N, dim] in float32, cosines first; the form of DDPM with period 10,000."""
    exponents = -math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angles = t.float()[:, None] * exponents.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
