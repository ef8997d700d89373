"""The Triton kernels behind `ops`: imported on CUDA only. Each has its plain torch reference, of the same signature,
there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcli.engine.ops import NORM_EPS


@triton.jit
def _qk_norm_rope(
    projection, joint, norm_q, norm_k, cos, sin,
    rows, first, sequence, projection_stride, eps,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    # One program per token and per one of q, k, v: a tile of all its heads.
    token, which = tl.program_id(0), tl.program_id(1)
    batch, position = (token // rows).to(tl.int64), token % rows + first
    head, column = tl.arange(0, HEADS_PADDED)[:, None], tl.arange(0, HEAD_DIM)[None]
    mask = head < HEADS
    offsets = (which * HEADS + head) * HEAD_DIM + column
    source = projection + token.to(tl.int64) * projection_stride + offsets
    target = joint + (batch * sequence + position) * (3 * HEADS * HEAD_DIM) + offsets
    raw = tl.load(source, mask=mask, other=0.0)
    if which == 2:
        tl.store(target, raw, mask=mask)
    else:
        x = raw.to(tl.float32)
        weight = tl.load((norm_q if which == 0 else norm_k) + tl.arange(0, HEAD_DIM)).to(tl.float32)[None]
        x = x * tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / HEAD_DIM + eps) * weight
        x = x.to(raw.dtype).to(tl.float32)  # the reference rounds between norm and rotation
        a, b = tl.split(tl.reshape(x, (HEADS_PADDED, HEAD_DIM // 2, 2)))
        pair = position * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)
        c, s = tl.load(cos + pair)[None], tl.load(sin + pair)[None]
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS_PADDED, HEAD_DIM))
        tl.store(target, turned.to(raw.dtype), mask=mask)


def qk_norm_rope(
    projections: list[Tensor], norms_q: list[Tensor], norms_k: list[Tensor], cos: Tensor, sin: Tensor, heads: int
) -> Tensor:
    """`ops.qk_norm_rope` in one pass over memory: each stream's q, k and v are read once and written once, in place in
    the joint layout that attention reads."""
    head_dim = 2 * cos.shape[1]
    batch, sequence = projections[0].shape[0], cos.shape[0]
    joint = torch.empty(batch, sequence, 3, heads, head_dim, dtype=projections[0].dtype, device=projections[0].device)
    first = 0
    for projection, norm_q, norm_k in zip(projections, norms_q, norms_k, strict=True):
        rows = projection.shape[1]
        _qk_norm_rope[(batch * rows, 3)](
            projection, joint, norm_q, norm_k, cos, sin,
            rows, first, sequence, projection.stride(1), NORM_EPS,
            HEADS=heads, HEADS_PADDED=triton.next_power_of_2(heads), HEAD_DIM=head_dim,
        )  # fmt: skip
        first += rows
    return joint
