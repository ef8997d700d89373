"""The Triton kernel of `rope`: imported on CUDA only. All arithmetic is in float32; values are rounded where they are
stored."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _qk_norm_rope(
    qkv, first_q, first_k, second_q, second_k, cos, sin,
    rows, sequence, first, batch_stride, row_stride, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    # One program per `TOKENS` tokens and per group of heads, all of them queries or all keys.
    group = tl.program_id(1)
    key = group * GROUP >= HEADS
    line = tl.arange(0, TOKENS * GROUP)
    row = tl.program_id(0) * TOKENS + line // GROUP
    batch, position = (row // sequence).to(tl.int64), row % sequence
    mask = (row < rows)[:, None]
    column = tl.arange(0, HEAD_DIM)
    start = batch * batch_stride + position.to(tl.int64) * row_stride + (group * GROUP + line % GROUP) * HEAD_DIM
    place = qkv + start[:, None] + column[None]
    raw = tl.load(place, mask=mask, other=0.0)
    x = raw.to(tl.float32)
    weight = tl.load((first_k if key else first_q) + column).to(tl.float32)[None]
    other = tl.load((second_k if key else second_q) + column).to(tl.float32)[None]
    weight = tl.where((position < first)[:, None], weight, other)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / HEAD_DIM + eps) * weight
    x = x.to(raw.dtype).to(tl.float32)  # the reference rounds between norm and rotation
    a, b = tl.split(tl.reshape(x, (TOKENS * GROUP, HEAD_DIM // 2, 2)))
    pair = position[:, None] * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)[None]
    c, s = tl.load(cos + pair, mask=mask, other=0.0), tl.load(sin + pair, mask=mask, other=0.0)
    turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (TOKENS * GROUP, HEAD_DIM))
    tl.store(place, turned.to(raw.dtype), mask=mask)


def qk_norm_rope_(
    qkv: Tensor, first: int, norms_q: Sequence[Tensor], norms_k: Sequence[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """See `rope.qk_norm_rope_`. The norms are of the `first` tokens and of the others, [Dh] each."""
    head_dim = 2 * cos.shape[1]
    batch, sequence, width = qkv.shape
    heads, tokens = width // (3 * head_dim), 4
    group = min(heads & -heads, 8)  # as many as divide the heads, and are a power of two
    _qk_norm_rope[(triton.cdiv(batch * sequence, tokens), 2 * heads // group)](
        qkv, norms_q[0], norms_k[0], norms_q[-1], norms_k[-1], cos, sin,
        batch * sequence, sequence, first, *qkv.stride()[:2], eps,
        HEADS=heads, GROUP=group, HEAD_DIM=head_dim, TOKENS=tokens, num_warps=8,
    )  # fmt: skip
    return qkv.unflatten(-1, (3, heads, head_dim))
