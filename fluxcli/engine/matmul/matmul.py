"""The matmuls of a step on CUDA: each by the fastest of the backends that are here, as the tuner found it.

All of them sum in float32, each in an order of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from fluxcli.engine.matmul.gemm import Backend, Gemm
from fluxcli.engine.matmul.quack import Quack
from fluxcli.engine.matmul.torch_ import WAY, Torch
from fluxcli.engine.runtime.tuner import Tuner

_APART = "apart"  # each of several gemms by its own fastest way
_FEW_ROWS = 1024  # fewer are a small part of a step, and not timed


class Matmul:
    """A `Multiply` whose choices are one engine's tuner's."""

    def __init__(self, tuner: Tuner, device: str) -> None:
        self._tuner = tuner
        self._torch = Torch()
        optional: list[Backend | None] = [Quack.here(device)]
        self._backends: list[Backend] = [self._torch, *(each for each in optional if each is not None)]
        self._here = ", ".join(each.release for each in self._backends)

    def __call__(self, gemm: Gemm) -> Tensor:
        if gemm.rows < _FEW_ROWS:
            return self._torch.run(WAY, [gemm])[0]
        ways = self._ways([gemm])
        rehearsal = partial(self._rehearsal, gemm) if gemm.add else None
        return self._tuner.run(self._named(gemm.problem()), ways, rehearsal)[0]

    def pair(self, first: Gemm, second: Gemm) -> tuple[Tensor, Tensor]:
        """See `Multiply`."""
        gemms = [first, second]

        def apart() -> tuple[Tensor, ...]:
            return self(first), self(second)

        ways: dict[str, Callable[[], tuple[Tensor, ...]]] = {_APART: apart}
        if first.rows >= _FEW_ROWS:
            ways |= self._ways(gemms)
        problem = f"{first.problem()} and {second.problem()}"
        one, other = self._tuner.run(self._named(problem), ways) if len(ways) > 1 else apart()
        return one, other

    def _ways(self, gemms: Sequence[Gemm]) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        return {way: partial(each.run, way, gemms) for each in self._backends for way in each.ways(gemms)}

    def _rehearsal(self, gemm: Gemm) -> Mapping[str, Callable[[], object]]:
        assert gemm.out is not None
        return self._ways([replace(gemm, out=gemm.out.clone())])  # what is added to is added to once only

    def _named(self, problem: str) -> str:
        """With the releases that are here: where others were, the choice is made anew."""
        return f"{problem}; {self._here}"
