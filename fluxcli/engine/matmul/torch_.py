"""Matmuls by torch: the plain reference on any device, and torch's own fused calls on CUDA."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine.matmul.gemm import Gemm
from fluxcli.engine.matmul.layout import adjacent

WAY = "torch"
_BY_IMAGE = "torch by image"  # a matmul for each, straight to where its rows go
_MULTIPLE = 16  # of which `torch._scaled_mm` wants inputs and outputs


class Reference:
    """Plain torch on any device: what CPUs run, and what every backend is held to."""

    def __call__(self, gemm: Gemm) -> Tensor:
        if gemm.add:
            return _added(gemm)
        result = _linear(gemm)
        if gemm.gelu:
            result = F.gelu(result, approximate="tanh")
        return result if gemm.out is None else gemm.out.copy_(result)

    def pair(self, first: Gemm, second: Gemm) -> tuple[Tensor, Tensor]:
        return self(first), self(second)


class Torch:
    """The backend that surely runs on CUDA. Bias, and GELU, are part of cuBLASLt's epilogue."""

    release = f"torch {torch.__version__}"

    def ways(self, gemms: Sequence[Gemm]) -> Sequence[str]:
        if len(gemms) > 1:
            return ()
        gemm = gemms[0]
        apart = gemm.scales is not None and gemm.out is not None and not gemm.one_matrix and _lies_well(gemm)
        return (WAY, _BY_IMAGE) if apart else (WAY,)

    def run(self, way: str, gemms: Sequence[Gemm]) -> tuple[Tensor, ...]:
        gemm = gemms[0]
        if gemm.scales is None:
            return (_run(gemm),)
        return (_by_image(gemm) if way == _BY_IMAGE else _run_scaled(gemm),)


def _linear(gemm: Gemm) -> Tensor:
    if gemm.scales is None:
        return F.linear(gemm.x, gemm.weight, gemm.bias)
    assert gemm.bias is not None
    of_x, of_weight = gemm.scales
    wide = torch.promote_types(gemm.dtype, torch.float32)
    sums = F.linear(gemm.x.to(wide), gemm.weight.to(wide))
    return (sums * of_x[..., None] * of_weight + gemm.bias).to(gemm.dtype)


def _run(gemm: Gemm) -> Tensor:
    x, weight, bias, out = gemm.x, gemm.weight, gemm.bias, gemm.out
    if gemm.add:
        return _added(gemm)
    if gemm.gelu and bias is not None:  # cuBLASLt's epilogue is the tanh form
        result = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])
    elif out is not None and bias is not None and adjacent(out):
        torch.addmm(bias, x.flatten(0, -2), weight.t(), out=out.flatten(0, -2))
        return out
    else:
        return Reference()(gemm)
    return result if out is None else out.copy_(result)


def _run_scaled(gemm: Gemm) -> Tensor:
    if not _lies_well(gemm):
        return Reference()(gemm)
    assert gemm.scales is not None
    result = _scaled_mm(gemm, gemm.x.flatten(0, -2), gemm.scales[0].flatten()).view(gemm.shape)
    return result if gemm.out is None else gemm.out.copy_(result)


def _by_image(gemm: Gemm) -> Tensor:
    assert gemm.out is not None and gemm.scales is not None
    for x, scale, out in zip(gemm.x, gemm.scales[0], gemm.out, strict=True):
        _scaled_mm(gemm, x, scale, out=out)
    return gemm.out


def _scaled_mm(gemm: Gemm, x: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows x [M, K] of a gemm's, which `scale` [M] belongs to. Sums are Hopper's own, of few bits: at 15,360
    inputs they add less than a hundredth to the error of 8 bits, and save a fifth of the time (jobs/bench/LOG.md)."""
    assert gemm.scales is not None
    scales = scale[:, None], gemm.scales[1][None]
    weight, kind = gemm.weight.t(), gemm.dtype
    return torch._scaled_mm(x, weight, *scales, gemm.bias, out_dtype=kind, use_fast_accum=True, out=out)


def _lies_well(gemm: Gemm) -> bool:
    """No layer of a model of FLUX.1's size does not."""
    return gemm.x.shape[-1] % _MULTIPLE == 0 and gemm.weight.shape[0] % _MULTIPLE == 0


def _added(gemm: Gemm) -> Tensor:
    assert gemm.out is not None
    gemm.out.flatten(0, -2).addmm_(gemm.x.flatten(0, -2), gemm.weight.t())
    return gemm.out
