"""The Triton kernel of `scaling`: imported on CUDA only. All arithmetic is in float32; and `to_e4m3`, which other
kernels end in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcli.engine.matmul.scaled import E4M3, E4M3_MAX, LEAST, Scaled

_MAX, _LEAST = tl.constexpr(E4M3_MAX), tl.constexpr(LEAST)
_GELU = tl.constexpr(2 * 0.7978845608028654)  # twice the root of 2 / pi: tanh(x) is 2 * sigmoid(2 * x) - 1
_CUBE = tl.constexpr(0.044715)


@triton.jit
def largest(x):
    """The largest absolute value of a finite row; NaN where it has one, which the maximum alone would pass over."""
    return tl.max(tl.abs(x), axis=0) + tl.sum(x * 0.0, axis=0)


@triton.jit
def scale_of(most):
    """The scale of a row whose largest absolute value is `most`, as `scaled.row_scaled` has it."""
    return tl.maximum(most / _MAX, _LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_e4m3(value, scale):
    return bounded(value / scale, _MAX).to(tl.float8e4nv)


@triton.jit
def bounded(value, LIMIT: tl.constexpr):
    """Within LIMIT of zero; a NaN stays one."""
    return tl.clamp(value, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_scaled(
    plain, curved, values, scales,
    tokens, plain_batch, plain_token, curved_batch, curved_token, plain_dim, curved_dim,
    PLAIN: tl.constexpr, CURVED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    # One program per token: its row stays in registers between the GELU, the scale and the store.
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    most = 0.0
    if PLAIN > 0:
        first = tl.arange(0, PLAIN)
        x = tl.load(plain + batch * plain_batch + token * plain_token + first, mask=first < plain_dim, other=0.0)
        a = bounded(x.to(tl.float32), LIMIT)
        most = largest(a)
    if CURVED > 0:
        second = tl.arange(0, CURVED)
        y = tl.load(curved + batch * curved_batch + token * curved_token + second, mask=second < curved_dim, other=0.0)
        b = bounded(y.to(tl.float32), LIMIT)
        b = b * tl.sigmoid((b * b * b * _CUBE + b) * _GELU)
        most = tl.maximum(most, largest(b), propagate_nan=tl.PropagateNan.ALL)
    scale = scale_of(most)
    start = values + row * (plain_dim + curved_dim)
    if PLAIN > 0:
        tl.store(start + first, to_e4m3(a, scale), mask=first < plain_dim)
    if CURVED > 0:
        tl.store(start + plain_dim + second, to_e4m3(b, scale), mask=second < curved_dim)
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
    blocks = [triton.next_power_of_2(dim) if dim else 0 for dim in dims]
    _row_scaled[(batch * tokens,)](
        given if plain is None else plain, given if curved is None else curved, values, scales,
        tokens, *strides, *dims,
        PLAIN=blocks[0], CURVED=blocks[1], LIMIT=torch.finfo(given.dtype).max, num_warps=8,
    )  # fmt: skip
    return Scaled(values, scales)
