"""Matmuls by torch: the plain reference on any device, and torch's own fused calls on CUDA."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine.matmul.gemm import Gemm
from fluxcli.engine.matmul.layout import adjacent

WAY = "torch"


class Reference:
    """Plain torch on any device: what CPUs run, and what every backend is held to."""

    def __call__(self, gemm: Gemm) -> Tensor:
        if gemm.add:
            return _added(gemm)
        result = F.linear(gemm.x, gemm.weight, gemm.bias)
        if gemm.gelu:
            result = F.gelu(result, approximate="tanh")
        return result if gemm.out is None else gemm.out.copy_(result)

    def pair(self, first: Gemm, second: Gemm) -> tuple[Tensor, Tensor]:
        return self(first), self(second)


class Torch:
    """The backend that surely runs on CUDA. Bias, and GELU, are part of cuBLASLt's epilogue."""

    release = f"torch {torch.__version__}"

    def ways(self, gemms: Sequence[Gemm]) -> Sequence[str]:
        return (WAY,) if len(gemms) == 1 else ()

    def run(self, way: str, gemms: Sequence[Gemm]) -> tuple[Tensor, ...]:
        return (_run(gemms[0]),)


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


def _added(gemm: Gemm) -> Tensor:
    assert gemm.out is not None
    gemm.out.flatten(0, -2).addmm_(gemm.x.flatten(0, -2), gemm.weight.t())
    return gemm.out
