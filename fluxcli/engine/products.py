"""The matrix products of a step on CUDA: each by the fastest there is for its shape.

torch takes cuBLASLt's first suggestion, and copies where the rows of a batch do not follow each other. Here its other
suggestions are timed too, and quack-kernels' products where that is installed, once per shape (`tuning`); the winner
stays in the compile cache. All of them sum in float32, each in an order of its own. The table of choices is the
process's, as cuBLASLt's handle is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.engine import cublaslt, pingpong, timing
from fluxcli.engine.cublaslt import Problem, problem_of
from fluxcli.engine.graphs import Pool, capture

TORCH = "torch"  # torch's own call. Other choices: a name of `pingpong`, or cuBLASLt's algorithm, in hexadecimal
_FINALISTS = 3
_TURN_S = 0.03
_CALLS = 4  # in the graph that is timed
_FEW_ROWS = 1024  # fewer are a small part of a step, and not timed
_TMA_ALIGNMENT = 16  # bytes; what Hopper's copy engine asks for

_choices: dict[str, str] = {}
_tuning = False


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x [..., K] times weight [N, K], plus bias [N], through GELU in its tanh form where `gelu` -> [..., N]."""
    return _product("gelu" if gelu else "bias", x, weight, bias, None)


def add_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y [..., N], contiguous, with x [..., K] times weight [N, K] added to it in place."""
    return _product("add", x, weight, None, y)


@contextmanager
def tuning() -> Iterator[None]:
    """Times every product of a shape that is not in the table yet, for as long as the block runs. Elsewhere such a
    product is torch's. Not to be entered while a graph is captured."""
    global _tuning
    _tuning = True
    try:
        yield
    finally:
        _tuning = False


def choices() -> dict[str, str]:
    """The table: a problem's name -> what does it."""
    return dict(_choices)


def remember(known: Mapping[str, str], device: torch.device) -> None:
    """Adds an earlier process's choices to the table, but for what is no longer installed."""
    lost = () if pingpong.choices(device) else ("quack",)
    _choices.update({name: choice for name, choice in known.items() if not choice.startswith(lost)})


def candidates(problem: Problem, device: torch.device) -> list[str]:
    """Everything that can do this product, torch's call first."""
    others = pingpong.choices(device) if problem.batches == 1 and problem.alignment >= _TMA_ALIGNMENT else ()
    return [TORCH, *(algorithm.hex() for algorithm in cublaslt.suggestions(problem)), *others]


def _product(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None) -> Tensor:
    problem = problem_of(kind, x, weight, bias, y)
    choice = _choices.get(problem.name) if problem else TORCH
    if choice is None and problem and _tuning and problem.batches * problem.rows >= _FEW_ROWS:
        choice = _choices[problem.name] = _fastest(problem, x, weight, bias, y)
    return _run(choice or TORCH, problem, kind, x, weight, bias, y)


def _run(
    choice: str, problem: Problem | None, kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None
) -> Tensor:
    if problem is None or choice == TORCH:
        return _by_torch(kind, x, weight, bias, y)
    out = x.new_empty(*x.shape[:-1], weight.shape[0]) if y is None else y
    if choice.startswith("quack"):
        pingpong.multiply(choice, kind, x, weight, bias, out)
    else:
        cublaslt.multiply(bytes.fromhex(choice), problem, x, weight, bias, out)
    return out


def _by_torch(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None) -> Tensor:
    if y is not None:
        y.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t())
        return y
    if kind == "gelu":  # cuBLASLt's epilogue is the tanh form
        out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return out.unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


def _fastest(problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None) -> str:
    scratch, device = None if y is None else y.clone(), str(x.device)
    pool = torch.cuda.graph_pool_handle()  # one result's memory for all
    runs: dict[str, Callable[[], None]] = {}
    for choice in candidates(problem, x.device):
        call = partial(_run, choice, problem, problem.kind, x, weight, bias, scratch)
        try:
            call()
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if not choice.startswith("quack"):
                raise
            continue  # a release of it that does not go with this torch or GPU
        runs[choice] = _captured(call, pool)
    once = {choice: timing.seconds(run, 1, device) for choice, run in runs.items()}
    best = sorted(once, key=once.__getitem__)[:_FINALISTS]
    times = timing.interleaved({choice: runs[choice] for choice in best}, device, _TURN_S)
    return min(best, key=lambda choice: median(times[choice]))


def _captured(call: Callable[[], Tensor], pool: Pool) -> Callable[[], None]:
    """A replay of `_CALLS` calls, as a step makes them: launching takes some longer than others."""

    def calls() -> None:
        for _ in range(_CALLS):
            call()

    graph, _ = capture(calls, pool)
    replay: Callable[[], None] = graph.replay
    replay()
    return replay
