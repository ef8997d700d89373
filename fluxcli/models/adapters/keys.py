"""The keys of adapter files: what a trainer writes before and behind a layer's name.

PEFT and diffusers, ai-toolkit, kohya's sd-scripts, ComfyUI, Black Forest Labs, fal, OneTrainer, XLabs, LyCORIS.
"""

import re
from typing import NamedTuple

_DENOISER, _CLIP, _T5 = "transformer", "text_encoder", "text_encoder_2"
# The first that fits says the part; last, the denoiser's bare names.
_PREFIXES = {
    "text_encoders.clip_l.transformer.": _CLIP,
    "text_encoders.t5xxl.transformer.": _T5,
    "text_encoder_2.": _T5,
    "text_encoder.": _CLIP,
    "lora_te_": _CLIP,
    "lora_te1_": _CLIP,
    "lora_te2_": _T5,
    "lora_te3_": _T5,
    "model.diffusion_model.": _DENOISER,
    "diffusion_model.": _DENOISER,
    "base_model.model.": _DENOISER,
    "transformer.": _DENOISER,
    "lora_unet_": _DENOISER,
    "lora_transformer_": _DENOISER,
    "lycoris_": _DENOISER,
    "": _DENOISER,
}
# What a tensor is to its layer.
_ROLES = {
    "down": ("lora_A", "lora_A.default", "lora_down", "lora.down", "lora_linear_layer.down", "down"),
    "up": ("lora_B", "lora_B.default", "lora_up", "lora.up", "lora_linear_layer.up", "up"),
}
_ENDINGS = {f"{name}.weight": role for role, names in _ROLES.items() for name in names}
_ENDINGS |= {
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "dora_scale": "magnitude",
    "diff": "diff",
    "diff_b": "bias",
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, sorted(_ENDINGS, key=len, reverse=True)))})")


class Key(NamedTuple):
    """`module` is the key without its ending; `layer` that without the trainer's prefix."""

    module: str
    part: str
    layer: str
    role: str


def parse(key: str) -> Key | None:
    """A key taken apart; None for one that no trainer writes."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    module, role = match[1], _ENDINGS[match[2]]
    prefix = next(each for each in _PREFIXES if module.startswith(each))
    part = _PREFIXES[prefix]
    layer = module.removeprefix(prefix)
    if part == _CLIP:  # a level that transformers' class had once and lacks now
        layer = layer.removeprefix("text_model.").removeprefix("text_model_")
    return Key(module, part, layer, role)
