"""The Triton kernel of `scaling`: imported on CUDA only. All arithmetic is in float32; and `to_e4m3`, which other
kernels end in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcli.engine.matmul.scaled import E4M3, E4M3_MAX, LEAST, Scaled

_SHARE, _LEAST = tl.constexpr(1 / E4M3_MAX), tl.constexpr(LEAST)
_GELU = tl.constexpr(-2 * 0.7978845608028654 / 0.6931471805599453)  # -2 * sqrt(2 / pi), of a power of 2 instead of e
_CUBE = tl.constexpr(0.044715)
_FEW = 6  # pieces of a row


@triton.jit
def larger(a, b):
    """Of two; NaN where one is NaN, which a plain maximum would pass over."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(sizes):
    """The largest of a row's absolute values."""
    return tl.reduce(sizes, 0, larger)


@triton.jit
def scale_of(most):
    """The scale of a row whose largest absolute value is `most`, as `scaled.row_scaled` has it."""
    return larger(most * _SHARE, _LEAST)


@triton.jit
def to_e4m3(value, scale):
    return (value * (1.0 / scale)).to(tl.float8e4nv)


@triton.jit
def bounded(value, LIMIT: tl.constexpr):
    """Within LIMIT of zero; a NaN stays one."""
    return tl.clamp(value, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu(x):
    return x / (1.0 + tl.exp2((x * x * x * _CUBE + x) * _GELU))


@triton.jit
def _row_scaled(
    plain, curved, values, scales,
    tokens, plain_batch, plain_token, curved_batch, curved_token, plain_dim, curved_dim,
    PLAIN: tl.constexpr, PLAINS: tl.constexpr, CURVED: tl.constexpr, CURVEDS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    # One program per token: its row stays in registers between the GELU, the scale and the store.
    row = tl.program_id(0).to(tl.int64)
    plain += row // tokens * plain_batch + row % tokens * plain_token
    curved += row // tokens * curved_batch + row % tokens * curved_token
    values += row * (plain_dim + curved_dim)
    most, parts = 0.0, ()
    if PLAINS > 0:
        largest = tl.zeros((PLAIN,), tl.float32)
        for i in tl.static_range(PLAINS):
            at = i * PLAIN + tl.arange(0, PLAIN)
            x = bounded(tl.load(plain + at, mask=at < plain_dim, other=0.0).to(tl.float32), LIMIT)
            largest = larger(largest, tl.abs(x))
            parts = parts + (x,)  # type: ignore[assignment]  # noqa: RUF005, all that Triton knows
        most = largest_of(largest)
    if CURVEDS > 0:
        largest = tl.zeros((CURVED,), tl.float32)
        for i in tl.static_range(CURVEDS):
            at = i * CURVED + tl.arange(0, CURVED)
            x = _gelu(bounded(tl.load(curved + at, mask=at < curved_dim, other=0.0).to(tl.float32), LIMIT))
            largest = larger(largest, tl.abs(x))
            parts = parts + (x,)  # type: ignore[assignment]  # noqa: RUF005, all that Triton knows
        most = larger(most, largest_of(largest))
    scale = scale_of(most)
    for i in tl.static_range(PLAINS):
        at = i * PLAIN + tl.arange(0, PLAIN)
        tl.store(values + at, to_e4m3(parts[i], scale), mask=at < plain_dim)
    for i in tl.static_range(CURVEDS):
        at = i * CURVED + tl.arange(0, CURVED)
        tl.store(values + plain_dim + at, to_e4m3(parts[PLAINS + i], scale), mask=at < curved_dim)
    tl.store(scales + row, scale)


def row_scaled(plain: Tensor | None, curved: Tensor | None) -> Scaled:
    """See `scaling`: [B, S, K] each, of any strides between tokens and batches; one may be None."""
    given = plain if plain is not None else curved
    assert given is not None
    batch, tokens, _ = given.shape
    dims = [0 if each is None else each.shape[-1] for each in (plain, curved)]
    strides = [stride for each in (plain, curved) for stride in ((0, 0) if each is None else each.stride()[:2])]
    values = torch.empty((batch, tokens, sum(dims)), dtype=E4M3, device=given.device)
    scales = torch.empty((batch, tokens), dtype=torch.float32, device=given.device)
    (plain_block, plains), (curved_block, curveds) = map(_pieces, dims)
    _row_scaled[(batch * tokens,)](
        given if plain is None else plain, given if curved is None else curved, values, scales,
        tokens, *strides, *dims,
        PLAIN=plain_block, PLAINS=plains, CURVED=curved_block, CURVEDS=curveds, LIMIT=torch.finfo(given.dtype).max,
        num_warps=8,
    )  # fmt: skip
    return Scaled(values, scales)


def _pieces(dim: int) -> tuple[int, int]:
    """The length, a power of two, and the number of pieces of a row: none that is masked where few pieces do, as at
    FLUX.1's widths."""
    exact = dim & -dim
    if dim <= _FEW * exact:
        return exact, dim // max(1, exact)
    return triton.next_power_of_2(dim), 1
