"""Prompt ids -> embeddings, through transformers' T5 and CLIP text encoders."""

import torch
from torch import Tensor

from fluxcli.checkpoints import Checkpoint
from fluxcli.engine.weights import load_part


class TextEncoders:
    """T5 (`text_encoder_2`) makes one embedding per token, CLIP (`text_encoder`) one per prompt."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype, visiting: bool = False) -> None:
        """`visiting`: T5's blocks stay in host memory and come to the device one at a time."""
        self._clip = load_part(checkpoint, "text_encoder", device, dtype)
        self._t5 = load_part(checkpoint, "text_encoder_2", device, dtype, "encoder.block" if visiting else None)

    def __call__(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """t5_ids [B, L], clip_ids [B, 77] -> T5's last hidden state [B, L, width], CLIP's pooled output [B, width].

        No attention mask, as in FLUX: padding tokens are part of the text.
        """
        txt = self._t5(input_ids=t5_ids).last_hidden_state
        vec = self._clip(input_ids=clip_ids).pooler_output
        return txt, vec
