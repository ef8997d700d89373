"""Weights that are made up, for a model that measures a machine."""

import torch

from fluxcli.engine.weights.copying import PIECE
from fluxcli.engine.weights.sources import Slots

SEED = 0


def fill_random(slots: Slots, device: str) -> None:
    """Seeded values, made on `device` wherever the slots are, of a size that keeps activations finite through every
    block: matrices with the variance of their fan-in, norm weights of one, small biases."""
    generator = torch.Generator(device).manual_seed(SEED)
    for name, slot in slots:
        if slot.ndim > 1:
            deviation = slot[0].numel() ** -0.5
        elif name.endswith("bias"):
            deviation = 0.02
        else:
            slot.fill_(1)
            continue
        # In pieces: FLUX.1's modulations are one matrix of 6.5 GB, and a second one of that size need not fit.
        for piece in slot.view(-1).split(PIECE // slot.element_size()):
            piece.copy_(torch.empty_like(piece, device=device).normal_(0, deviation, generator=generator))
