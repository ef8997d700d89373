"""What tests of kernels share: random data, the same data in float64, and how far apart two results are."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
HALVES = [torch.bfloat16, torch.float16]


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")(test))


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()).item()


def exact(x: Any) -> Any:
    """The same argument in float64 on the host, where the reference runs."""
    if isinstance(x, Tensor):
        return x.detach().double().cpu()
    if isinstance(x, torch.nn.Module):
        return copy.deepcopy(x).double().cpu()
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(exact, x))
    return type(x)(map(exact, x)) if isinstance(x, list | tuple) else x


def drawn(*shapes: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape).to(device, dtype) for shape in shapes]
