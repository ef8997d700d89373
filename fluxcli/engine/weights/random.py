"""Weights that are made up, for a model that measures a machine."""

import torch
from torch import Tensor

from fluxcli.engine.matmul.scaled import Scaled, store
from fluxcli.engine.weights.copying import PIECE
from fluxcli.engine.weights.sources import Slots

SEED = 0


def fill_random(slots: Slots, device: str, dtype: torch.dtype) -> None:
    """Seeded values, made on `device` wherever the slots are, of a size that keeps activations finite through every
    block: matrices with the variance of their fan-in, norm weights of one, small biases. Those that are stored in 8
    bits are the same as in `dtype`, made smaller."""
    generator = torch.Generator(device).manual_seed(SEED)
    for name, slot in slots:
        if isinstance(slot, Scaled):
            whole = torch.empty(slot.values.shape, dtype=dtype, device=device)
            _fill(name, whole, generator)
            store(slot, whole)
        else:
            _fill(name, slot, generator)


def _fill(name: str, slot: Tensor, generator: torch.Generator) -> None:
    if slot.ndim > 1:
        deviation = slot[0].numel() ** -0.5
    elif name.endswith("bias"):
        deviation = 0.02
    else:
        slot.fill_(1)
        return
    # In pieces: FLUX.1's modulations are one matrix of 6.5 GB, and a second one of that size need not fit.
    for piece in slot.view(-1).split(PIECE // slot.element_size()):
        piece.copy_(torch.empty_like(piece, device=generator.device).normal_(0, deviation, generator=generator))
