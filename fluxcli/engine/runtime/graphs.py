"""CUDA graphs, captured by hand: a function of tensors recorded once at one shape, replayed ever after."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

    Pool = _POOL_HANDLE  # memory that graphs share

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """A function of tensors as a CUDA graph over copies of its inputs.

    What the function reads beside its inputs is read again by every replay, at the same addresses: the function keeps
    it alive. Graphs that share a pool must not run at the same time; captured largest first, the smaller ones fit into
    the memory of the first.
    """

    def __init__(self, run: Callable[..., Result], *inputs: Tensor, pool: "Pool | None" = None) -> None:
        """Captures `run` at the shapes of `inputs`. It is called twice: once so that compiling, planning and the
        loading of kernels are over, and once recorded."""
        self._run = run  # what it holds, the graph reads
        self._inputs = [each.clone() for each in inputs]
        self.replays = 0
        with aside():
            run(*self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._result = run(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Result:
        """What `run` returns for these inputs: the graph's own memory, good until any graph of its pool runs."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        self.replays += 1
        return self._result


def record(run: Callable[[], object], pool: "Pool") -> torch.cuda.CUDAGraph:
    """The graph of a `run` that ran `aside` before: for many short-lived graphs, since no free memory is given back to
    the device for it, as torch does for each. To be called `aside` too."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(pool=pool)
    try:
        run()
    finally:
        graph.capture_end()
    return graph


@contextmanager
def aside() -> Iterator[None]:
    """On a stream beside the current one, which waits for it: a graph cannot be captured on the default stream."""
    side = _side(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            yield
    finally:  # after a failure too: what was queued there still uses the memory that is now given up
        torch.cuda.current_stream().wait_stream(side)


@cache
def _side(device: int) -> torch.cuda.Stream:
    # One for all: cuBLAS keeps a workspace for every stream that it meets.
    return torch.cuda.Stream(device)
