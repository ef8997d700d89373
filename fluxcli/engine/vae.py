"""Latents -> pixels, through diffusers' AutoencoderKL."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcli.engine.layers.groupnorm import add_biased, group_norm_silu
from fluxcli.engine.weights.fill import load_part
from fluxcli.models.checkpoints import Checkpoint

# Pixels decoded at once: one 1024x1024 image, or several smaller ones. Bounds the decoder's memory at any batch size.
_PIXELS_AT_ONCE = 2**20


class Decoder:
    """The decoder half of the VAE. On CUDA it runs channels-last, its norms fused with what surrounds them; on a CPU
    torch compiles it where `compile` says so."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype, compile: bool) -> None:
        self._vae = load_part(checkpoint, "vae", device, dtype)
        config = self._vae.config
        self.scale: int = 2 ** (len(config.block_out_channels) - 1)  # pixels along a side of one latent pixel
        self._factor: float = config.scaling_factor
        self._shift: float = config.shift_factor or 0.0
        self._channels_last = device.startswith("cuda")
        if self._channels_last:
            self._vae.to(memory_format=torch.channels_last)
            fuse(self._vae.decoder)
        elif compile:
            self._vae.decoder.compile(fullgraph=True, dynamic=False)

    def __call__(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """latents [B, C, H, W] -> uint8 [B, 8H, 8W, 3], rounded to nearest; and whether each was finite [B]: what is
        not would come out as a black image."""
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


class FusedResnet(nn.Module):
    """A ResnetBlock2D of diffusers with the same weights: between its convolutions each image crosses memory as often
    as it must. The convolutions leave their bias to the pass that follows."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.conv_shortcut = block.conv_shortcut

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        h = F.conv2d(_norm_silu(self.norm1, x), self.conv1.weight, padding=1)
        h = F.conv2d(_norm_silu(self.norm2, h, self.conv1.bias), self.conv2.weight, padding=1)
        return add_biased(x if self.conv_shortcut is None else self.conv_shortcut(x), h, self.conv2.bias)


class FusedUpsample(nn.Module):
    """An Upsample2D of diffusers, nearest neighbour and a convolution, with the same weights; torch's kernel for the
    former is slow channels-last."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv = block.conv

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        nhwc = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
        return self.conv(nhwc.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2))


class NormSiLU(nn.Module):
    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return _norm_silu(self.norm, x)


def fuse(decoder: Any) -> None:
    """Puts the fused blocks into diffusers' decoder, wherever a block is of the plain kind that FLUX.1 has."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    for parent in list(decoder.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, ResnetBlock2D) and _is_plain(block):
                setattr(parent, name, FusedResnet(block))
            if isinstance(block, Upsample2D) and block.norm is None and block.use_conv and block.name == "conv":
                setattr(parent, name, FusedUpsample(block))
    if isinstance(decoder.conv_norm_out, nn.GroupNorm) and isinstance(decoder.conv_act, nn.SiLU):
        decoder.conv_norm_out, decoder.conv_act = NormSiLU(decoder.conv_norm_out), nn.Identity()


def _is_plain(block: Any) -> bool:
    changes_size = block.upsample is not None or block.downsample is not None
    timed = block.time_emb_proj is not None
    return isinstance(block.nonlinearity, nn.SiLU) and block.output_scale_factor == 1 and not changes_size and not timed


def _norm_silu(norm: nn.GroupNorm, x: Tensor, before: Tensor | None = None) -> Tensor:
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, before)


def chunk_size(batch: int, pixels: int) -> int:
    """How many images to decode at once: the largest divisor of the batch within the budget, so that every chunk of
    a batch has one shape."""
    return max(
        size for size in range(1, batch + 1) if batch % size == 0 and (size == 1 or size * pixels <= _PIXELS_AT_ONCE)
    )
