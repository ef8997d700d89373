"""A stream of tokens whose last update is still to be added."""

from typing import NamedTuple

import torch
from torch import Tensor

HALF_MAX = 65504.0  # the largest float16; the residual stream of FLUX leaves it now and then, and is clipped


class Pending(NamedTuple):
    """A stream [B, S, D]: its value is x + gate * update.

    The next norm adds it on its way, so that the stream crosses memory once where it would twice. gate [B, D] and
    update [B, S, D] are None where nothing is pending.
    """

    x: Tensor
    gate: Tensor | None = None
    update: Tensor | None = None

    def tail(self, first: int) -> "Pending":
        """The tokens from `first` on."""
        return Pending(self.x[:, first:], self.gate, None if self.update is None else self.update[:, first:])

    def settle(self) -> Tensor:
        """The stream's value [B, S, D]."""
        if self.gate is None or self.update is None:
            return self.x
        total = self.x + self.gate[:, None] * self.update
        return total.clip(-HALF_MAX, HALF_MAX) if total.dtype == torch.float16 else total
