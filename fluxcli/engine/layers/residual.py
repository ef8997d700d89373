"""The residual stream: a stream of tokens whose last update is still to be added."""

from typing import NamedTuple

from torch import Tensor

from fluxcli.engine.layers.norm import Modulation, add_and_modulate, gated_sum
from fluxcli.engine.matmul.scaled import Scaled


class Residual(NamedTuple):
    """A stream [B, S, D] of the value x + gate * update.

    The next norm adds the update on its way, so that the stream crosses memory once where it would twice. gate [B, D]
    and update [B, S, D] are None where nothing is to be added.
    """

    x: Tensor
    gate: Tensor | None = None
    update: Tensor | None = None

    def add(self, gate: Tensor | None, update: Tensor) -> "Residual":
        """The stream with gate * update on top, to be added by the next norm. Nothing may be left to add before."""
        assert self.update is None, "an update would be lost"
        return Residual(self.x, gate, update)

    def norm(self, modulation: Modulation, fp8: bool) -> tuple["Residual", Tensor | Scaled]:
        """The stream with nothing left to add, and its modulated LayerNorm [B, S, D], in 8 bits where `fp8`."""
        total, normed = add_and_modulate(self.x, self.gate, self.update, modulation.shift, modulation.scale, fp8)
        return Residual(total), normed

    def tail(self, first: int) -> "Residual":
        """The tokens from `first` on."""
        return Residual(self.x[:, first:], self.gate, None if self.update is None else self.update[:, first:])

    def value(self) -> Tensor:
        """[B, S, D]."""
        return self.x if self.gate is None or self.update is None else gated_sum(self.x, self.gate, self.update)
