"""CUDA graphs, captured by hand. The one that counts is a denoising step at one shape, replayed for every step of every
batch.

The number of steps, the guidance and the schedule are no part of a graph: they come in through the step's modulations
and `dt`, which are copied into its static buffers before each replay."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from fluxcli.engine.denoise import euler_step

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # (img, txt, mod) -> velocity
Pool = tuple[int, int]  # memory that graphs share
Result = TypeVar("Result")


def capture(run: Callable[[], Result], pool: Pool | None = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of a `run`, and what it returned: written anew by every replay, good until any graph of the pool runs.

    `run` is called twice: once so that compiling, planning and the loading of kernels are over, and once recorded. What
    it reads is read again by every replay, at the same addresses: the caller keeps it alive. Graphs that share a pool
    must not run at the same time; captured largest first, the smaller ones fit into the memory of the first.
    """
    with aside():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph, result


def record(run: Callable[[], object], pool: Pool) -> torch.cuda.CUDAGraph:
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


class StepGraph:
    """Static buffers and the captured step.

    Buffers: img [B, I, C] (in and out), txt [B, L, D], mod [B, modulations, D] in the model's dtype; dt [] in float32.
    """

    def __init__(self, step: Step, img: Tensor, txt: Tensor, mod: Tensor, pool: Pool) -> None:
        """Captures `step` at the shapes of the given tensors."""
        self.img, self.txt, self.mod = img.clone(), txt.clone(), mod.clone()
        self.dt = torch.zeros((), dtype=torch.float32, device=img.device)
        self.replays = 0

        def whole() -> None:
            self.img.copy_(euler_step(self.img, step(self.img, self.txt, self.mod), self.dt))

        self._graph, _ = capture(whole, pool)

    def run(self, img: Tensor, txt: Tensor, steps: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """A whole batch. `steps` yields each step's (mod, dt). The result is the graph's own buffer, good until the
        next run."""
        self.img.copy_(img)
        self.txt.copy_(txt)
        for mod, dt in steps:
            self.mod.copy_(mod)
            self.dt.copy_(dt)
            self._graph.replay()
            self.replays += 1
        return self.img
