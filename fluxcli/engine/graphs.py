"""One denoising step at one shape, captured by hand as a CUDA graph and replayed for every step of every batch.

The number of steps, the guidance and the schedule are no part of a graph: they come in through the step's modulations
and `dt`, which are copied into its static buffers before each replay."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fluxcli.engine.sampling import euler_step

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # (img, txt, mod) -> velocity


class StepGraph:
    """Static buffers and the captured step.

    Buffers: img [B, I, C] (in and out), txt [B, L, D], mod [B, modulations, D] in the model's dtype; dt [] in float32.
    """

    def __init__(self, step: Step, img: Tensor, txt: Tensor, mod: Tensor, pool: tuple[int, int]) -> None:
        """Captures `step` at the shapes of the given tensors. It must have run at these shapes before, so that
        compiling and planning are over. Graphs that share `pool` must not run at the same time; they are captured
        largest first, so that the smaller ones fit into the memory of the first."""
        self.img, self.txt, self.mod = img.clone(), txt.clone(), mod.clone()
        self.dt = torch.zeros((), dtype=torch.float32, device=img.device)
        self.replays = 0
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self.img.copy_(euler_step(self.img, step(self.img, self.txt, self.mod), self.dt))

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
