"""Matmuls by quack-kernels, on Hopper, where it is installed: two groups of warps take turns, so that the epilogue of
one (`epilogues`) runs beside the matmul of the other."""

import warnings
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from fluxcli.core.errors import Remark, first_line
from fluxcli.engine.matmul.gemm import Gemm
from fluxcli.engine.matmul.layout import adjacent, alignment, neighbours
from fluxcli.engine.runtime.compile_cache import share_cute_caches

# The tile [rows, outputs] of a group that was fastest of five at nearly all of FLUX.1's shapes (jobs/bench/LOG.md).
_ROWS, _OUTPUTS = 128, 192
_OUTPUTS_IN_8_BITS = 208  # likewise, of four
_WAY = f"quack {_ROWS}x{_OUTPUTS}"
_WAY_IN_8_BITS = f"quack {_ROWS}x{_OUTPUTS_IN_8_BITS}"
_HOPPER = 9
_TMA_ALIGNMENT = 16  # bytes; what Hopper's copy engine asks for


class Quack:
    """The backend. Made by `here`."""

    def __init__(self, epilogues: Any, config: Any, release: str) -> None:
        self.release = release
        self._epilogues = epilogues
        self._configs = {
            way: config(tile_m=_ROWS, tile_n=outputs, pingpong=True, cluster_m=2, is_dynamic_persistent=False)
            for way, outputs in ((_WAY, _OUTPUTS), (_WAY_IN_8_BITS, _OUTPUTS_IN_8_BITS))
        }

    @classmethod
    def here(cls, device: str) -> "Quack | None":
        """None where there is no such GPU or no such package. One that is there and cannot be imported, whatever it
        raises, is told."""
        if torch.cuda.get_device_capability(device)[0] != _HOPPER:
            return None
        share_cute_caches()
        try:
            from quack.gemm_config import GemmConfig

            from fluxcli.engine.matmul import epilogues

            return cls(epilogues, GemmConfig, f"quack {metadata.version('quack-kernels')}")
        except Exception as error:
            if getattr(error, "name", None) != "quack":
                message = f"quack-kernels cannot be used and is left out: {first_line(error)}"
                warnings.warn(message, Remark, stacklevel=2)
            return None

    def ways(self, gemms: Sequence[Gemm]) -> Sequence[str]:
        if not all(_lies_well(each) for each in gemms):
            return ()
        if len(gemms) == 1:
            return (_WAY,) if gemms[0].scales is None else (_WAY_IN_8_BITS,)
        return (_WAY,) if _half_gelu(*gemms) else ()

    def run(self, way: str, gemms: Sequence[Gemm]) -> tuple[Tensor, ...]:
        if len(gemms) == 2:
            return self._run_half_gelu(*gemms)
        gemm = gemms[0]
        x, weight, bias = gemm.x, gemm.weight, gemm.bias
        out = x.new_empty(gemm.shape, dtype=gemm.dtype) if gemm.out is None else gemm.out
        operands = {"more": out} if bias is None else {"bias": bias}
        if gemm.scales is None:
            self._multiply(way, gemm.kind, x, weight, out, **operands)
        else:
            tokens, outputs = gemm.scales
            self._multiply(way, "scaled", x, weight, out, tokens=tokens, outputs=outputs, **operands)
        return (out,)

    def _run_half_gelu(self, first: Gemm, second: Gemm) -> tuple[Tensor, Tensor]:
        """Both as one matmul, whose epilogue leaves GELU out for the outputs of the first."""
        assert first.bias is not None
        x, plain, outputs = first.x, len(first.weight), len(first.weight) + len(second.weight)
        weight = first.weight.as_strided((outputs, x.shape[-1]), first.weight.stride())
        bias = first.bias.as_strided((outputs,), (1,))
        out = x.new_empty(*x.shape[:-1], outputs)
        curved = _curved(plain, outputs, x.dtype, x.device)
        self._multiply(_WAY, "gelu_in_part", x, weight, out, bias=bias, curved=curved)
        one, other = out.split((plain, outputs - plain), dim=-1)
        return one, other

    def _multiply(
        self, way: str, epilogue: str, x: Tensor, weight: Tensor, out: Tensor, tokens: Tensor | None = None,
        **operands: Tensor,
    ) -> None:  # fmt: skip
        """Fills out [..., N] with what the epilogue makes of x [..., K] times weight [N, K].

        Args:
            tokens: the epilogue's operand of this name, a value for each row [...].
            operands: others, by name: a value for each output [N], or out itself.
        """
        batches = len(x) if x.ndim == 3 else 1
        if batches > 1 and not (adjacent(x) and adjacent(out)):
            weights = weight.t().expand(batches, -1, -1)
            operands = {name: each if each.ndim > 1 else each.expand(batches, -1) for name, each in operands.items()}
        else:  # one matrix
            weights, x, out = weight.t(), x.flatten(0, -2), out.flatten(0, -2)
            operands = {name: each.flatten(0, -2) if each.ndim > 1 else each[None] for name, each in operands.items()}
            tokens = None if tokens is None else tokens.flatten()[None]
        if tokens is not None:
            operands["tokens"] = tokens
        run = getattr(self._epilogues, epilogue)
        run(x, weights, out={"D": out}, tuned=False, config=self._configs[way], **operands)


def _lies_well(gemm: Gemm) -> bool:
    x, weight, out = gemm.x, gemm.weight, gemm.out
    if gemm.dtype not in (torch.bfloat16, torch.float16) or not (gemm.one_matrix or x.ndim == 3):
        return False
    new = weight.shape[0] * gemm.dtype.itemsize  # bytes of a row of a new result
    return (
        all(each.stride(-1) == 1 for each in gemm.tensors)
        and alignment(*gemm.tensors) >= _TMA_ALIGNMENT
        and (out is not None or new % _TMA_ALIGNMENT == 0)
    )


def _half_gelu(first: Gemm, second: Gemm) -> bool:
    return (
        first.kind == "bias"
        and second.kind == "gelu"
        and first.out is None
        and second.out is None
        and first.bias is not None
        and second.bias is not None
        and neighbours(first.weight, second.weight)
        and neighbours(first.bias, second.bias)
    )


@cache
def _curved(plain: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[outputs], 1 from `plain` on."""
    return (torch.arange(outputs, device=device) >= plain).to(dtype)
