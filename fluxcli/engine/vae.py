"""Latents -> pixels, through diffusers' AutoencoderKL."""

import torch
from torch import Tensor

from fluxcli.checkpoints import Checkpoint
from fluxcli.engine.weights import load_part

# Pixels decoded at once: one 1024x1024 picture, or several smaller ones. Bounds the decoder's memory at any batch size.
_PIXELS_AT_ONCE = 2**20


class Decoder:
    """The decoder half of the VAE. On CUDA it is compiled and runs channels-last."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype, compile: bool) -> None:
        self._vae = load_part(checkpoint, "vae", device, dtype)
        self._vae.encoder = None
        config = self._vae.config
        self.scale: int = 2 ** (len(config.block_out_channels) - 1)  # pixels along a side of one latent pixel
        self._factor: float = config.scaling_factor
        self._shift: float = config.shift_factor or 0.0
        self._channels_last = device.startswith("cuda")
        if self._channels_last:
            self._vae.to(memory_format=torch.channels_last)
        if compile:
            self._vae.decoder.compile(fullgraph=True, dynamic=False)

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents [B, C, H, W] -> uint8 [B, 8H, 8W, 3], rounded to nearest; and whether each was finite [B]: what is
        not would come out as a black picture."""
        size = chunk_size(len(latents), latents.shape[-1] * latents.shape[-2] * self.scale**2)
        parts = [self._decode(part) for part in latents.split(size)]
        pixels, finite = (torch.cat(each) for each in zip(*parts, strict=True))
        return pixels, finite

    def _decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        latents = latents / self._factor + self._shift
        if self._channels_last:
            latents = latents.contiguous(memory_format=torch.channels_last)
        pixels = self._vae.decode(latents, return_dict=False)[0].float()
        finite = torch.isfinite(pixels).all(dim=(1, 2, 3))
        rounded = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return rounded.permute(0, 2, 3, 1).contiguous(), finite


def chunk_size(batch: int, pixels: int) -> int:
    """How many pictures to decode at once: the largest divisor of the batch within the budget, so that every chunk of
    a batch has one shape."""
    return max(
        size for size in range(1, batch + 1) if batch % size == 0 and (size == 1 or size * pixels <= _PIXELS_AT_ONCE)
    )
