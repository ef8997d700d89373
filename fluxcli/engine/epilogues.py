"""What quack-kernels does with a product's sums before they leave the chip, value by value and in float32. Imported
where that package is installed; `pingpong` runs them."""

from typing import Any

from quack.activation import gelu_tanh_approx
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import RowVecLoad, TileLoad

_bias, _gate, _curved = (RowVecLoad(name) for name in ("bias", "gate", "curved"))  # a value for each output
_x, _more = TileLoad("x"), TileLoad("more")  # a value for each row and output


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


@gemm_epilogue(ops={"x": _x, "gate": _gate, "bias": _bias})
def gated(acc: Any, x: Any, gate: Any, bias: Any) -> dict[str, Any]:
    return {"D": x + gate * (acc + bias)}


@gemm_epilogue(ops={"x": _x, "gate": _gate, "more": _more})
def gated_sum(acc: Any, x: Any, gate: Any, more: Any) -> dict[str, Any]:
    return {"D": x + gate * (acc + more)}
