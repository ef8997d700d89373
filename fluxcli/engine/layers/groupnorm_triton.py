"""The Triton kernels of `groupnorm`: imported on CUDA only. All arithmetic is in float32; values are rounded where they
are stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor


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
