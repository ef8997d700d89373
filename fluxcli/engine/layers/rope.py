"""What lies between the projection to q, k and v and their attention: RMSNorm of queries and keys, and rotary
position embedding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcli.engine.layers.norm import NORM_EPS


class Rope(NamedTuple):
    """Rotary tables of S positions, [S, Dh / 2] in float32 each."""

    cos: Tensor
    sin: Tensor


class QKNorm(nn.Module):
    """The weights [Dh] of the RMSNorms over queries and keys, not initialised."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.key = nn.Parameter(torch.empty(head_dim), requires_grad=False)


def rope(ids: Tensor, axes_dims: tuple[int, ...], theta: float) -> Rope:
    """Rotary tables of positions, ids [S, axes], with sum(axes_dims) = Dh.

    Each axis turns its own share of the head, at angles id * theta^(-2i/dim); computed in float64 as FLUX does.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        angles.append(torch.outer(ids[:, axis].double(), frequencies))
    joined = torch.cat(angles, dim=1)
    return Rope(joined.cos().float(), joined.sin().float())


def qk_norm_rope_(qkv: Tensor, lengths: Sequence[int], norms: Sequence[QKNorm], pe: Rope) -> Tensor:
    """RMSNorm and rotation of queries and keys, in place.

    Args:
        qkv: q, k and v of every token side by side, [B, S, 3D], whose rows may lie apart.
        lengths: tokens of each stream, one or two, each with its own of `norms`.
        pe: tables of the S positions.

    Returns:
        qkv as [B, S, 3, H, Dh].
    """
    head_dim = 2 * pe.cos.shape[1]
    # The kernel's tiles are powers of two, as FLUX's heads of 128 are.
    if qkv.is_cuda and head_dim & (head_dim - 1) == 0:
        from fluxcli.engine.layers import rope_triton

        queries, keys = [norm.query for norm in norms], [norm.key for norm in norms]
        return rope_triton.qk_norm_rope_(qkv, lengths[0], queries, keys, *pe, NORM_EPS)
    heads = qkv.unflatten(-1, (3, -1, head_dim))
    tables = [Rope(*each) for each in zip(*(table.split(list(lengths)) for table in pe), strict=True)]
    for part, norm, table in zip(heads.split(list(lengths), dim=1), norms, tables, strict=True):
        for x, weight in ((part[:, :, 0], norm.query), (part[:, :, 1], norm.key)):
            x.copy_(_rotate(F.rms_norm(x, weight.shape, weight, eps=NORM_EPS), table))
    return heads


def _rotate(x: Tensor, pe: Rope) -> Tensor:
    """Turns neighbouring pairs of each head by their position's angles, in float32. x [B, S, H, Dh]."""
    c, s = pe.cos[None, :, None], pe.sin[None, :, None]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2).to(x.dtype)
