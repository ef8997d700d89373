"""The Triton kernels behind `ops`: imported on CUDA only. Each has its plain torch reference, of the same name and
signature, there. All arithmetic is in float32; values are rounded where they are stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcli.engine.ops import HALF_MAX, NORM_EPS, Pending


@triton.jit
def _modulate(
    x, update, gate, shift, scale, total, out,
    tokens, x_batch, x_token, update_batch, update_token, modulation_batch, dim, eps,
    BLOCK: tl.constexpr, UPDATE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    # One program per token: its row stays in registers between the sum, the norm and both stores.
    row = tl.program_id(0)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < dim
    own = row.to(tl.int64) * dim + column
    modulation = batch * modulation_batch + column
    value = tl.load(x + batch * x_batch + token * x_token + column, mask=mask, other=0.0)
    if UPDATE:
        added = tl.load(update + batch * update_batch + token * update_token + column, mask=mask, other=0.0)
        gated = tl.load(gate + modulation, mask=mask, other=0.0).to(tl.float32) * added.to(tl.float32)
        summed = value.to(tl.float32) + gated
        if LIMIT > 0:
            summed = tl.minimum(tl.maximum(summed, -LIMIT), LIMIT)
        value = summed.to(value.dtype)
        tl.store(total + own, value, mask=mask)
    wide = value.to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide, axis=0) / dim, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / dim + eps)
    factor = 1.0 + tl.load(scale + modulation, mask=mask, other=0.0).to(tl.float32)
    result = normed * factor + tl.load(shift + modulation, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + own, result.to(value.dtype), mask=mask)


def add_and_modulate(stream: Pending, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x, gate, update = stream
    batch, tokens, dim = x.shape
    out = torch.empty((batch, tokens, dim), dtype=x.dtype, device=x.device)
    total = x if update is None else torch.empty_like(out)
    update_strides = (0, 0) if update is None else update.stride()[:2]
    _modulate[(batch * tokens,)](
        x, x if update is None else update, x if gate is None else gate, shift, scale, total, out,
        tokens, *x.stride()[:2], *update_strides, shift.stride(0), dim, NORM_EPS,
        BLOCK=triton.next_power_of_2(dim), UPDATE=update is not None,
        LIMIT=HALF_MAX if x.dtype == torch.float16 else 0, num_warps=8,
    )  # fmt: skip
    return total, out


@triton.jit
def _qk_norm_rope(
    projection, joint, norm_q, norm_k, cos, sin,
    tokens, first, sequence, source_token, eps,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    # One program per token and per one of q, k, v: a tile of all its heads.
    row, which = tl.program_id(0), tl.program_id(1)
    batch, position = (row // tokens).to(tl.int64), row % tokens + first
    head, column = tl.arange(0, HEADS_PADDED)[:, None], tl.arange(0, HEAD_DIM)[None]
    mask = head < HEADS
    offsets = (which * HEADS + head) * HEAD_DIM + column
    source = projection + row.to(tl.int64) * source_token + offsets
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
    head_dim = 2 * cos.shape[1]
    batch, sequence = projections[0].shape[0], cos.shape[0]
    alone = len(projections) == 1
    # A single stream is turned in place, which spares v the way through memory.
    joint = projections[0] if alone else projections[0].new_empty(batch, sequence, 3 * heads * head_dim)
    first = 0
    for projection, norm_q, norm_k in zip(projections, norms_q, norms_k, strict=True):
        tokens = projection.shape[1]
        _qk_norm_rope[(batch * tokens, 2 if alone else 3)](
            projection, joint, norm_q, norm_k, cos, sin,
            tokens, first, sequence, projection.stride(1), NORM_EPS,
            HEADS=heads, HEADS_PADDED=triton.next_power_of_2(heads), HEAD_DIM=head_dim,
        )  # fmt: skip
        first += tokens
    return joint.view(batch, sequence, 3, heads, head_dim)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # cuBLASLt's epilogue is the tanh form.
    out: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])
