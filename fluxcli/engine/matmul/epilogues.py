"""What quack-kernels does with a matmul's sums before they leave the chip, value by value and in float32. Imported
where that package is installed; `quack` runs them."""

from functools import partialmethod
from typing import Any

from quack.activation import gelu_tanh_approx
from quack.epilogue.frontend import EpiMod, gemm_epilogue
from quack.epilogue.ops import ColVecLoad, RowVecLoad, TileLoad

_bias, _curved, _outputs = RowVecLoad("bias"), RowVecLoad("curved"), RowVecLoad("outputs")  # a value for each output
_tokens = ColVecLoad("tokens")  # a value for each row
_more = TileLoad("more")  # a value for each row and output


@gemm_epilogue(ops={"bias": _bias})
def bias(acc: Any, bias: Any) -> dict[str, Any]:
    return {"D": acc + bias}


@gemm_epilogue(ops={"bias": _bias})
def gelu(acc: Any, bias: Any) -> dict[str, Any]:
    return {"D": gelu_tanh_approx(acc + bias)}


@gemm_epilogue(ops={"bias": _bias, "curved": _curved})
def gelu_in_part(acc: Any, bias: Any, curved: Any) -> dict[str, Any]:
    """GELU where `curved` is 1, none where it is 0."""
    plain = acc + bias
    return {"D": curved * gelu_tanh_approx(plain) + (curved * -1.0 + 1.0) * plain}


@gemm_epilogue(ops={"more": _more})
def add(acc: Any, more: Any) -> dict[str, Any]:
    return {"D": more + acc}


class _ShortSums(EpiMod):  # type: ignore[misc]
    """An epilogue of sums in Hopper's own short form, as `torch_` has them. quack's kernels can do it, its epilogues
    alone cannot say so; with sums in float32 beside them a matmul took three times as long as torch's, or longer
    (jobs/bench/LOG.md)."""

    def _mint(self, *key: Any) -> Any:
        kernel = super()._mint(*key)
        if "__init__" not in vars(kernel):
            kernel.__init__ = partialmethod(kernel.__init__, fp8_fast_accum=True)
        return kernel


def _scaled(acc: Any, tokens: Any, outputs: Any, bias: Any) -> dict[str, Any]:
    """Of numbers in 8 bits, by the scales of their rows and of the weight's."""
    return {"D": acc * tokens * outputs + bias}


scaled = _ShortSums(_scaled, ops={"tokens": _tokens, "outputs": _outputs, "bias": _bias})
