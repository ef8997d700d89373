"""The fused decoder is diffusers' decoder."""

import torch
from diffusers import AutoencoderKL

from fluxcli.engine.vae import FusedResnet, NormSiLU, fuse
from fluxcli.models.checkpoints import resolve


@torch.inference_mode()
def test_the_fused_decoder_equals_diffusers() -> None:
    directory = resolve("tiny").directory / "vae"
    vae, fused = (AutoencoderKL.from_pretrained(directory).eval() for _ in range(2))
    fuse(fused.decoder)
    latents = torch.randn(2, 16, 8, 12)
    ours, theirs = fused.decode(latents).sample, vae.decode(latents).sample
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert theirs.std() > 0.1


def test_every_block_is_fused() -> None:
    vae = AutoencoderKL.from_pretrained(resolve("tiny").directory / "vae")
    fuse(vae.decoder)
    names = [type(module).__name__ for module in vae.decoder.modules()]
    assert not {"ResnetBlock2D", "Upsample2D"} & set(names)
    assert names.count(FusedResnet.__name__) == 2 + 4 * 2 and names.count(NormSiLU.__name__) == 1
