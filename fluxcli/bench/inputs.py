"""What one denoising step takes, drawn at random, in our terms and in diffusers'."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxcli.core.family import TOKEN_SIDE
from fluxcli.core.records import ShapeKey
from fluxcli.engine import denoise
from fluxcli.engine.denoise import Moment
from fluxcli.engine.nets.flux1 import Flux
from fluxcli.engine.runtime.device import DTYPES
from fluxcli.models.flux1.family import FLUX1


class Inputs:
    """Random latents and embeddings of one shape, on the device.

    img [B, I, in_channels], t5 [B, L, joint_attention_dim], vec [B, pooled_projection_dim] in `dtype`; ids [S, 3];
    guidance [B] in float32, None for a model that takes none.
    """

    def __init__(self, flux: Flux, key: ShapeKey, device: str, dtype: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[dtype])

        config, batch = flux.config, key.batch_size
        rows, columns = key.height // TOKEN_SIDE, key.width // TOKEN_SIDE
        self.key = key
        self.img = drawn(batch, rows * columns, config.in_channels)
        self.t5 = drawn(batch, key.text_length, config.joint_attention_dim)
        self.vec = drawn(batch, config.pooled_projection_dim)
        self.ids = denoise.position_ids(key.text_length, rows * denoise.PATCH, columns * denoise.PATCH, device)
        self.guidance = torch.full((batch,), FLUX1.guidance, device=device) if config.guidance_embeds else None

    def ours(self, flux: Flux, sigmas: Sequence[float]) -> tuple[Tensor, list[Moment]]:
        """txt [B, L, D] and a moment for each step from one of `sigmas` to the next."""
        levels = torch.tensor(sigmas, device=self.img.device)
        mods = flux.modulations(levels[:-1] * 1000, self.guidance, self.vec)
        return flux.embed_text(self.t5), list(map(Moment, mods, levels.diff()))

    def diffusers(self, img: Tensor, sigma: float) -> dict[str, Any]:
        """The arguments FluxPipeline gives FluxTransformer2DModel at `sigma`, in img's dtype."""
        length, dtype = self.key.text_length, img.dtype
        return {
            "hidden_states": img,
            "timestep": torch.full((len(img),), sigma, device=img.device, dtype=dtype),
            "guidance": self.guidance,
            "pooled_projections": self.vec.to(dtype),
            "encoder_hidden_states": self.t5.to(dtype),
            "txt_ids": self.ids[:length].to(dtype),
            "img_ids": self.ids[length:].to(dtype),
            "return_dict": False,
        }
