"""True classifier-free guidance: each image on two rows of the denoiser, of its prompt and of its negative prompt, and
one velocity of both. As FluxPipeline's `true_cfg_scale` means it."""

import torch
from torch import Tensor


class OneBranch:
    """Without it: a row of the denoiser is an image."""

    def rows(self, img: Tensor) -> Tensor:
        return img

    def velocity(self, rows: Tensor) -> Tensor:
        return rows


class TwoBranches:
    """With it. The scales lie at a fixed address, where captured steps read them.

    Args:
        images: B, how many there are.
    """

    def __init__(self, images: int, device: str) -> None:
        self._scale = torch.ones(images, 1, 1, dtype=torch.float32, device=device)

    def take(self, scales: Tensor) -> None:
        """The scales of a batch, [B]."""
        self._scale.copy_(scales[:, None, None], non_blocking=True)

    def rows(self, img: Tensor) -> Tensor:
        """img [B, I, C] -> [2B, I, C]: the prompts' rows, then the negative prompts'."""
        return torch.cat((img, img))

    def velocity(self, rows: Tensor) -> Tensor:
        """[2B, I, C] -> [B, I, C] in float32: from the negative prompt's towards the prompt's, `scale` times as far."""
        positive, negative = rows.float().chunk(2)
        return negative + self._scale * (positive - negative)


Branches = OneBranch | TwoBranches
