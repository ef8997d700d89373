"""How files hold FLUX.1's parts: which tensor tells that a part is there, what stands before its names, and what its
tensors are called in it, where those are not the names of the library's class."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fluxcli.core.family import Layout
from fluxcli.models.flux1.names import TABLES

TRANSFORMER = (
    Layout("comfy", "double_blocks.0.img_attn.norm.query_norm.weight"),
    Layout("bfl", "double_blocks.0.img_attn.qkv.weight"),
    Layout("diffusers", "transformer_blocks.0.attn.to_q.weight"),
)
TRANSFORMER_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
CLIP = (
    Layout("transformers", "text_model.embeddings.token_embedding.weight"),
    Layout("transformers", "embeddings.token_embedding.weight"),
)
CLIP_PREFIXES = ("", "text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l.transformer.")
T5 = (
    Layout("transformers", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    Layout("llama.cpp", "enc.blk.0.attn_q.weight"),
)
T5_PREFIXES = ("", "text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "t5xxl.transformer.")
VAE = (
    Layout("diffusers", "decoder.mid_block.resnets.0.conv1.weight"),
    Layout("ldm", "decoder.mid.block_1.conv1.weight"),
)
VAE_PREFIXES = ("", "vae.", "first_stage_model.")


def ldm(name: str, levels: int) -> str:
    """The name that Black Forest Labs' `ae.safetensors` has for a tensor of diffusers' AutoencoderKL with so many
    `levels`."""
    name = re.sub(r"\.mid_block\.resnets\.(\d)", lambda match: f".mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"\.mid_block\.attentions\.0", ".mid.attn_1", name)
    name = re.sub(r"\.up_blocks\.(\d+)", lambda match: f".up.{levels - 1 - int(match[1])}", name)
    for theirs, ldms in _LDM.items():
        name = name.replace(theirs, ldms)
    return name


_LDM = {
    ".attn_1.group_norm": ".attn_1.norm",
    ".to_q": ".q",
    ".to_k": ".k",
    ".to_v": ".v",
    ".to_out.0": ".proj_out",
    ".resnets": ".block",
    ".conv_shortcut": ".nin_shortcut",
    ".upsamplers.0": ".upsample",
    ".conv_norm_out": ".norm_out",
}


def llama(name: str) -> str:
    """The name that llama.cpp's GGUF files have for a tensor of transformers' T5EncoderModel."""
    for pattern, theirs in _LLAMA:
        name = re.sub(pattern, theirs, name)
    return name


_LLAMA = [
    (r"^(shared|encoder\.embed_tokens)\.", "token_embd."),
    (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"^encoder\.block\.", "enc.blk."),
    (r"\.layer\.0\.SelfAttention\.([qkvo])\.", r".attn_\1."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".attn_rel_b."),
    (r"\.layer\.0\.layer_norm\.", ".attn_norm."),
    (r"\.layer\.1\.layer_norm\.", ".ffn_norm."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn_gate."),
    (r"\.layer\.1\.DenseReluDense\.(wi_1|wi)\.", ".ffn_up."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn_down."),
]


def renamed(layout: str, config: Mapping[str, Any]) -> Callable[[str], str]:
    """From the names of a part's class to those of a layout. `config` is the part's."""
    if layout == "ldm":
        levels = len(config.get("block_out_channels", ()))
        return lambda name: ldm(name, levels)
    return llama if layout == "llama.cpp" else str


def sizes(layout: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a transformer's file says of transformer/config.json: how many blocks it has, whether it takes a guidance
    scale, and how many channels its latents have, in and out. FLUX.1's relatives differ in these.

    Args:
        shapes: of its tensors, by their names in that layout.
    """
    blocks = {"diffusers": ("transformer_blocks", "single_transformer_blocks")}.get(
        layout, ("double_blocks", "single_blocks")
    )
    counts = [
        len({match[1] for name in shapes if (match := re.match(rf"{re.escape(of)}\.(\d+)\.", name))}) for of in blocks
    ]
    table = dict(TABLES[layout](0, 0, True))
    guidance = any(f"{source.name}.weight" in shapes for source in table["guidance_in.in_layer"])
    into, out = (shapes.get(f"{table[layer][0].name}.weight", ()) for layer in ("img_in", "final_layer"))
    found = {"num_layers": counts[0], "num_single_layers": counts[1], "guidance_embeds": guidance}
    return {**found, "in_channels": into[1], "out_channels": out[0]} if len(into) == len(out) == 2 else found


# What a file is that is none of FLUX.1's parts, by a name in it: the first that matches.
_KINDS = (
    (r"lora_[ABE]\b|lora_(up|down)|\.lora\.|_lora\d?\.|lokr_|hada_w|dora_scale|lora_magnitude", "a LoRA, or its like"),
    (r"\.qweight$|\.wscales$|smooth_factor|proj_down", "a nunchaku file (SVDQuant): its weights are quantised"),
    (r"distilled_guidance_layer|approximator", "Chroma, which is no FLUX.1"),
    (r"double_stream_modulation_img|single_stream_modulation", "FLUX.2"),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"input_blocks\.|down_blocks\.\d+\.attentions", "a Stable Diffusion model of another architecture"),
    (r"controlnet_|control_model|input_hint_block", "a ControlNet"),
    (r"transformer\.resblocks\.|visual\.", "a CLIP in OpenAI's names; transformers' names are read"),
    (r"^(blk|token_embd)\b", "a language model"),
)


# What it is that may be one.
_PARTS = (
    (r"\b(img_attn\.qkv|attn\.add_q_proj)\b", "a denoiser"),
    (r"\bdecoder\.(mid|mid_block|up)\b", "a VAE"),
    (r"\bSelfAttention\b|^enc\.blk\b", "a T5"),
    (r"\bembeddings\.token_embedding\b", "a CLIP"),
)


def another(names: Iterable[str]) -> str | None:
    """What a file is, where such names tell that it is none of FLUX.1's parts."""
    return _first(_KINDS, names)


def what(names: Iterable[str]) -> str | None:
    """What a file with such names is, as far as they tell."""
    known = list(names)
    return _first(_KINDS, known) or _first(_PARTS, known)


def _first(kinds: Iterable[tuple[str, str]], names: Iterable[str]) -> str | None:
    known = list(names)
    return next((kind for pattern, kind in kinds if any(re.search(pattern, name) for name in known)), None)
