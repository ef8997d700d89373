"""A step without the blocks: what they added to the image stream when they last ran, carried on to this step's sigma.

Which steps those are is `core/step_cache.py`'s to say. What was measured and dropped (plain reuse, whole first and
second order, scales by ratios or least squares) stands in jobs/bench/LOG.md.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from fluxcli.engine.denoise import Moment, Steps, euler_step
from fluxcli.engine.layers.residual import Residual
from fluxcli.engine.nets.flux1 import Flux, Step
from fluxcli.engine.true_cfg import Branches

DAMPING = 0.5  # of the extrapolation: whole, it overshoots where reused steps are many
BUFFERS = 2


class Added:
    """What the blocks added to the image stream when they last ran, and how that differed from the time before: two
    [B, I, D] at fixed addresses, which captured steps write and read. B are rows of the denoiser.

    Args:
        memory: [BUFFERS, B, I, D] in the model's dtype. Shapes share it: a batch begins with `clear`.
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self.last, self._change = memory.unbind()

    def clear(self) -> None:
        """Forgets a batch, and with it what was not finite."""
        self._memory.zero_()

    def keep(self, added: Tensor) -> None:
        """Takes in what the blocks added now, [B, I, D]."""
        torch.sub(added, self.last, out=self._change)
        self.last.copy_(added)

    def predicted(self, ahead: Tensor) -> Tensor:
        """What they would add, `ahead` changes later: [B, I, D], summed in float32."""
        return (self.last.float() + ahead * self._change.float()).to(self.last.dtype)


class Kept:
    """The memory of `Added`, one for all shapes, since one runs at a time: of the largest so far."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, device=device, dtype=dtype)

    def at(self, batch_size: int, image_tokens: int, dim: int) -> Added:
        shape = (BUFFERS, batch_size, image_tokens, dim)
        if self._memory.numel() < prod(shape):
            self._memory = self._memory.new_zeros(prod(shape))
        return Added(self._memory[: prod(shape)].view(shape))


class Norms:
    """How large what the blocks added is after each step of a batch, without a word in the loop."""

    def __init__(self, added: Added) -> None:
        self._added = added
        self._norms: list[Tensor] = []

    def watched(self, moments: Iterator[Moment]) -> Iterator[Moment]:
        """The same moments; when the next is asked for, the step of the last is over."""
        for moment in moments:
            yield moment
            self._norms.append(self._added.last.float().norm(dim=-1))

    def ratios(self) -> list[float]:
        """Each step's norm over that of the step before, [B, I] of them, as MagCache takes their mean; 1 first."""
        pairs = pairwise(self._norms)
        return [1.0, *((now / before.clamp_min(1e-8)).mean().item() for before, now in pairs)]


def steps(flux: Flux, step: Step, added: Added | None, branches: Branches) -> Steps:
    """The steps of a shape; without a cache all are evaluated. What is kept changes no bit of an evaluated one. txt and
    mod are of the rows of the denoiser, as `branches` has them, img of the images."""

    def evaluate(img: Tensor, txt: Tensor, mod: Tensor, dt: Tensor) -> Tensor:
        embedded = flux.embed(branches.rows(img))
        stream = flux.body(embedded, txt, mod, step)
        if added is not None:
            added.keep(stream.value() - embedded)
        return euler_step(img, branches.velocity(flux.head(stream, mod)), dt)

    if added is None:
        return Steps(evaluate)

    def reuse(img: Tensor, mod: Tensor, dt: Tensor, ahead: Tensor) -> Tensor:
        stream = Residual(flux.embed(branches.rows(img)) + added.predicted(ahead))
        return euler_step(img, branches.velocity(flux.head(stream, mod)), dt)

    return Steps(evaluate, reuse)


def ahead(mask: str, sigmas: Tensor) -> Tensor:
    """How many of the last change each reused step is ahead of the last evaluated one, damped: [steps] in float32, 0 at
    evaluated steps.

    First order over sigma, at most one change. The first step, from noise alone, is unlike all others: no change from
    it is carried on.

    Args:
        sigmas: [steps + 1] on the host.
    """
    found = torch.zeros(len(mask))
    level = sigmas.tolist()
    last = before = 0
    for number, evaluated in enumerate(mask):
        if evaluated == "1":
            before, last = last, number
        elif before > 0 and (gap := level[last] - level[before]):
            found[number] = DAMPING * min(1.0, (level[number] - level[last]) / gap)
    return found
