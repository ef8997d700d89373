"""The matrix products of a step on CUDA: each by the fastest there is for its shape.

torch takes cuBLASLt's first suggestion, and copies where the rows of a batch do not follow each other. Here its other
suggestions are candidates too, and quack-kernels' products where that is installed. All of them sum in float32, each in
an order of its own; `choices` times them.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine.matmul import cublaslt, pingpong
from fluxcli.engine.matmul.cublaslt import Problem, problem_of
from fluxcli.engine.matmul.layout import adjacent
from fluxcli.engine.runtime import tuner
from fluxcli.engine.runtime.tuner import Way

TORCH = "torch"  # torch's own call. Other choices: a name of `pingpong`, or one of cuBLASLt's algorithms
APART = "apart"  # two products, each by its fastest
_CUBLASLT = "cublaslt"
_FEW_ROWS = 1024  # fewer are a small part of a step, and not timed
_TMA_ALIGNMENT = 16  # bytes; what Hopper's copy engine asks for


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, out: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K], plus bias [N], through GELU in its tanh form where `gelu` -> [..., N].

    Args:
        out: where the result goes; its rows, and its batches, may lie apart.
    """
    return _product("gelu" if gelu else "bias", x, weight, bias, out)


def add_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y [..., N], contiguous, with x [..., K] times weight [N, K] added to it in place."""
    return _product("add", x, weight, None, y)


def linear_and_gelu(x: Tensor, weight: Tensor, bias: Tensor, plain: int) -> tuple[Tensor, Tensor]:
    """Two layers over one input: x [..., K] times weight [N, K], plus bias [N], the outputs from `plain` on through
    GELU in its tanh form -> [..., plain] and [..., N - plain], which may be parts of one tensor."""
    outputs = (plain, len(bias) - plain)

    def run(choice: str) -> tuple[Tensor, Tensor]:
        if choice == APART:
            (w, w_gelu), (b, b_gelu) = weight.split(outputs), bias.split(outputs)
            return linear(x, w, b), linear(x, w_gelu, b_gelu, gelu=True)
        out = x.new_empty(*x.shape[:-1], len(bias))
        curved = _curved(plain, len(bias), x.dtype, x.device)
        pingpong.multiply(choice, "gelu_in_part", x, weight, out, bias=bias, curved=curved)
        first, second = out.split(outputs, dim=-1)
        return first, second

    def ways(problem: Problem) -> dict[str, Way]:
        # Of quack's tiles the first, whose rounds over the chip this is for (jobs/bench/LOG.md, 20).
        return {name: partial(run, name) for name in (APART, *_pingpong(problem, x.device)[:1])}

    problem = problem_of("gelu", x, weight, bias, None)
    return run(_choice(f"from {plain} on: ", problem, x.device, ways) or APART)


def candidates(problem: Problem, device: torch.device) -> list[str]:
    """Everything that can do this product alone, torch's call first."""
    suggested = (f"{_CUBLASLT} {algorithm.hex()}" for algorithm in cublaslt.suggestions(problem))
    return [TORCH, *suggested, *_pingpong(problem, device)]


def _pingpong(problem: Problem, device: torch.device) -> tuple[str, ...]:
    return pingpong.choices(device) if problem.alignment >= _TMA_ALIGNMENT else ()


def _choice(
    what: str, problem: Problem | None, device: torch.device, ways: Callable[[Problem], Mapping[str, Way]]
) -> str | None:
    """What the table has for it. A problem is named with the versions of the libraries that may do it."""
    if problem is None or problem.batches * problem.rows < _FEW_ROWS:
        return None
    name = f"{what}{problem.name}; cublaslt {cublaslt.version()}; {pingpong.release(device)}"
    return tuner.fastest(name, partial(ways, problem), device)


def _product(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None) -> Tensor:
    def ways(problem: Problem) -> dict[str, Way]:
        scratch = y.clone() if kind == "add" and y is not None else y  # added to once only; else written over
        names = candidates(problem, x.device)
        return {name: partial(_run, name, problem, kind, x, weight, bias, scratch) for name in names}

    problem = problem_of(kind, x, weight, bias, y)
    return _run(_choice("", problem, x.device, ways) or TORCH, problem, kind, x, weight, bias, y)


def _run(
    choice: str, problem: Problem | None, kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None
) -> Tensor:
    if problem is None or choice == TORCH:
        return _by_torch(kind, x, weight, bias, y)
    out = x.new_empty(*x.shape[:-1], weight.shape[0]) if y is None else y
    if choice.startswith("quack"):
        pingpong.multiply(choice, kind, x, weight, out, **({"more": out} if bias is None else {"bias": bias}))
    else:
        cublaslt.multiply(bytes.fromhex(choice.removeprefix(_CUBLASLT)), problem, x, weight, bias, out)
    return out


def _by_torch(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None) -> Tensor:
    if bias is None:
        assert y is not None
        y.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t())
        return y
    if kind == "bias" and y is not None and adjacent(y):
        torch.addmm(bias, x.flatten(0, -2), weight.t(), out=y.flatten(0, -2))
        return y
    if kind == "gelu":  # cuBLASLt's epilogue is the tanh form
        out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])
    else:
        out = F.linear(x, weight, bias)
    return out if y is None else y.copy_(out)


@cache
def _curved(plain: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[outputs], 1 from `plain` on."""
    return (torch.arange(outputs, device=device) >= plain).to(dtype)
