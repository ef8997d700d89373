"""The Triton kernel of `norm`: imported on CUDA only. All arithmetic is in float32; values are rounded where they are
stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxcli.engine.layers.scaling_triton import bounded, largest_of, scale_of, to_e4m3
from fluxcli.engine.matmul.scaled import E4M3, Scaled


@triton.jit
def _modulate(
    x, update, gate, shift, scale, total, out, out_scale,
    tokens, x_batch, x_token, update_batch, update_token, gate_batch, shift_batch, scale_batch, dim, eps,
    BLOCK: tl.constexpr, UPDATE: tl.constexpr, LIMIT: tl.constexpr, FP8: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    # One program per token: its row stays in registers between the sum, the norm and both stores.
    row = tl.program_id(0)
    batch, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < dim
    own = row.to(tl.int64) * dim + column
    value = tl.load(x + batch * x_batch + token * x_token + column, mask=mask, other=0.0)
    if UPDATE:
        added = tl.load(update + batch * update_batch + token * update_token + column, mask=mask, other=0.0)
        gated = tl.load(gate + batch * gate_batch + column, mask=mask, other=0.0).to(tl.float32) * added.to(tl.float32)
        summed = value.to(tl.float32) + gated
        if LIMIT > 0:
            summed = tl.minimum(tl.maximum(summed, -LIMIT), LIMIT)
        value = summed.to(value.dtype)
        tl.store(total + own, value, mask=mask)
    wide = value.to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide, axis=0) / dim, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / dim + eps)
    factor = 1.0 + tl.load(scale + batch * scale_batch + column, mask=mask, other=0.0).to(tl.float32)
    result = normed * factor + tl.load(shift + batch * shift_batch + column, mask=mask, other=0.0).to(tl.float32)
    if FP8:
        result = tl.where(mask, bounded(result, MOST), 0.0)
        row_scale = scale_of(largest_of(tl.abs(result)))
        tl.store(out + own, to_e4m3(result, row_scale), mask=mask)
        tl.store(out_scale + row, row_scale)
    else:
        tl.store(out + own, result.to(value.dtype), mask=mask)


def add_and_modulate(
    x: Tensor, gate: Tensor | None, update: Tensor | None, shift: Tensor, scale: Tensor, eps: float, half_max: float,
    fp8: bool = False,
) -> tuple[Tensor, Tensor | Scaled]:  # fmt: skip
    """See `norm.add_and_modulate`. float16 is clipped at `half_max`."""
    batch, tokens, dim = x.shape
    out = torch.empty((batch, tokens, dim), dtype=E4M3 if fp8 else x.dtype, device=x.device)
    out_scale = torch.empty((batch, tokens), dtype=torch.float32, device=x.device) if fp8 else x
    total = x if update is None else torch.empty((batch, tokens, dim), dtype=x.dtype, device=x.device)
    update_strides = (0, 0) if update is None else update.stride()[:2]
    modulation_strides = (0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0))
    _modulate[(batch * tokens,)](
        x, x if update is None else update, x if gate is None else gate, shift, scale, total, out, out_scale,
        tokens, *x.stride()[:2], *update_strides, *modulation_strides, dim, eps,
        BLOCK=triton.next_power_of_2(dim), UPDATE=update is not None,
        LIMIT=half_max if x.dtype == torch.float16 else 0, FP8=fp8, MOST=torch.finfo(x.dtype).max, num_warps=8,
    )  # fmt: skip
    return total, Scaled(out, out_scale) if fp8 else out
