"""True classifier-free guidance: each image on two rows of the denoiser, of its prompt and of its negative prompt, and
one velocity of both. As FluxPipeline's `true_cfg_scale` means it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxcli.core.records import PromptRecord, ShapeKey


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


def prompts(key: ShapeKey, records: Sequence[PromptRecord]) -> list[str]:
    """Of each row of the denoiser: the prompts of B images, then the negative prompts where there are two branches."""
    negative = [record.negative_prompt or "" for record in records] if key.branches > 1 else []
    return [*(record.prompt for record in records), *negative]


def of_each(rows: Tensor, branches: int) -> list[Tensor]:
    """[branches * B, ...] -> of each of B images its own rows, [branches, ...]."""
    return [each.contiguous() for each in rows.unflatten(0, (branches, -1)).unbind(1)]
