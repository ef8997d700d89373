"""The Triton kernels behind `ops`: imported on CUDA only. Each has its plain torch reference, of the same name and
signature, there. All arithmetic is in float32; values are rounded where they are stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcli.engine.layers.ops import NORM_EPS
from fluxcli.engine.layers.residual import HALF_MAX, Pending


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


def qk_norm_rope(
    qkv: Tensor, lengths: list[int], norms_q: list[Tensor], norms_k: list[Tensor], cos: Tensor, sin: Tensor
) -> Tensor:
    head_dim = 2 * cos.shape[1]
    batch, sequence, width = qkv.shape
    heads, tokens = width // (3 * head_dim), 4
    group = min(heads & -heads, 8)  # as many as divide the heads, and are a power of two
    _qk_norm_rope[(triton.cdiv(batch * sequence, tokens), 2 * heads // group)](
        qkv, norms_q[0], norms_k[0], norms_q[-1], norms_k[-1], cos, sin,
        batch * sequence, sequence, lengths[0], *qkv.stride()[:2], NORM_EPS,
        HEADS=heads, GROUP=group, HEAD_DIM=head_dim, TOKENS=tokens, num_warps=8,
    )  # fmt: skip
    return qkv.unflatten(-1, (3, heads, head_dim))


@triton.jit
def _channel_moments(
    x, before, mean, m2, pixels, channels, chunks,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    # One program per chunk of pixels. Sums are taken about the chunk's first pixel, so that squares do not cancel.
    chunk, batch = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    known = column < channels
    first = chunk * CHUNK
    base = x + (batch.to(tl.int64) * pixels + first) * channels + column
    pivot = tl.load(base, mask=known, other=0.0).to(tl.float32)
    totals, squares = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (first + row < pixels) & known[None]
        value = tl.load(base[None] + row * channels, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - pivot[None], 0.0)
        totals += value  # summed over rows once, at the end: that is the costly part
        squares += value * value
    total = tl.sum(totals, axis=0)
    average = total / tl.minimum(CHUNK, pixels - first)
    if BEFORE:
        pivot += tl.load(before + column, mask=known, other=0.0).to(tl.float32)
    own = (batch * chunks + chunk) * channels + column
    tl.store(mean + own, average + pivot, mask=known)
    tl.store(m2 + own, tl.sum(squares, axis=0) - total * average, mask=known)


@triton.jit
def _group_moments(
    mean, m2, group_mean, group_rstd, pixels, channels, chunks, width, groups, eps,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program per group: the moments of its channels' chunks joined, after Chan, Golub and LeVeque (1983).
    group, batch = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)[None]
    base = batch * chunks * channels + group * width + column
    size = pixels * width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(STEPS):
        row = step * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < chunks) & (column < width)
        count = tl.minimum(CHUNK, pixels - row * CHUNK).to(tl.float32)
        total += count * tl.load(mean + base + row * channels, mask=mask, other=0.0)
    average = tl.sum(tl.sum(total, axis=1), axis=0) / size
    spread = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(STEPS):
        row = step * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (row < chunks) & (column < width)
        count = tl.minimum(CHUNK, pixels - row * CHUNK).to(tl.float32)
        off = tl.load(mean + base + row * channels, mask=mask, other=0.0) - average
        within = tl.load(m2 + base + row * channels, mask=mask, other=0.0)
        spread += tl.where(mask, within + count * off * off, 0.0)
    variance = tl.sum(tl.sum(spread, axis=1), axis=0) / size
    tl.store(group_mean + batch * groups + group, average)
    tl.store(group_rstd + batch * groups + group, tl.rsqrt(variance + eps))


@triton.jit
def _normalize_silu(
    x, before, weight, bias, group_mean, group_rstd, out, pixels, channels, width, groups,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    known = column < channels
    group = batch * groups + column // width
    factor = tl.load(group_rstd + group, mask=known, other=0.0) * tl.load(weight + column, mask=known, other=0.0)
    shift = -tl.load(group_mean + group, mask=known, other=0.0)
    if BEFORE:
        shift += tl.load(before + column, mask=known, other=0.0).to(tl.float32)
    offset = shift * factor + tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < pixels) & known[None]
    place = (batch.to(tl.int64) * pixels + row) * channels + column[None]
    raw = tl.load(x + place, mask=mask, other=0.0)
    normed = raw.to(tl.float32) * factor[None] + offset[None]
    tl.store(out + place, (normed * tl.sigmoid(normed)).to(raw.dtype), mask=mask)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, before: Tensor | None = None
) -> Tensor:
    batch, channels, height, width = x.shape
    pixels, block = height * width, triton.next_power_of_2(channels)
    chunk = max(32, min(1024, triton.next_power_of_2(pixels // 1024)))  # about a thousand programs
    chunks = triton.cdiv(pixels, chunk)
    mean, m2 = torch.empty(2, batch, chunks, channels, dtype=torch.float32, device=x.device)
    group_mean, group_rstd = torch.empty(2, batch, groups, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    given = x if before is None else before
    rows = max(1, 4096 // block)
    _channel_moments[(chunks, batch)](
        x, given, mean, m2, pixels, channels, chunks,
        CHUNK=chunk, ROWS=min(max(1, rows // 2), chunk), BLOCK=block, BEFORE=before is not None,
    )  # fmt: skip
    _group_moments[(groups, batch)](
        mean, m2, group_mean, group_rstd, pixels, channels, chunks, channels // groups, groups, eps,
        CHUNK=chunk, ROWS=64, STEPS=triton.cdiv(chunks, 64), BLOCK=triton.next_power_of_2(channels // groups),
    )  # fmt: skip
    _normalize_silu[(triton.cdiv(pixels, rows), batch)](
        x, given, weight, bias, group_mean, group_rstd, out, pixels, channels, channels // groups, groups,
        ROWS=rows, BLOCK=block, BEFORE=before is not None,
    )  # fmt: skip
    return out


@triton.jit
def _add_biased(x, y, bias, out, size, channels, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    a = tl.load(x + place, mask=mask, other=0.0)
    b = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
    b += tl.load(bias + (place % channels).to(tl.int32), mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, (a.to(tl.float32) + b).to(a.dtype), mask=mask)


def add_biased(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _add_biased[(triton.cdiv(x.numel(), 4096),)](x, y, bias, out, x.numel(), x.shape[1], BLOCK=4096, num_warps=8)
    return out
