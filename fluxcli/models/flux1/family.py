"""What FLUX.1 is: dev, schnell, Krea and what was made of them."""

from fluxcli.core.family import TOKEN_SIDE, Family, Part
from fluxcli.models.flux1 import layouts

_BACKEND = "PreTrainedTokenizerFast"  # reads any tokenizer.json as it stands


def _only(package: str, *classes: str, **rest: object) -> Part:
    return Part(package, {name: name for name in classes}, **rest)  # type: ignore[arg-type]


FLUX1 = Family(
    name="FLUX.1",
    pipelines=("FluxPipeline", "FluxKontextPipeline"),  # Kontext from text alone
    parts={
        "scheduler": _only(
            "diffusers", "FlowMatchEulerDiscreteScheduler", config="scheduler_config.json", weights=False
        ),
        "text_encoder": Part(
            "transformers",
            # FLUX.1 reads CLIP's pooled output before its projection, whichever class wrote the file.
            {"CLIPTextModel": "CLIPTextModel", "CLIPTextModelWithProjection": "CLIPTextModel"},
            ignored=r"^(text_projection\.|visual_projection\.|vision_model\.|logit_scale$)",
            layouts=layouts.CLIP,
            prefixes=layouts.CLIP_PREFIXES,
        ),
        "text_encoder_2": _only(
            "transformers",
            "T5EncoderModel",
            ignored=r"^(decoder\.|lm_head\.|dec\.|spiece_model$)",
            layouts=layouts.T5,
            prefixes=layouts.T5_PREFIXES,
        ),
        "tokenizer": Part(
            "transformers",
            {
                "CLIPTokenizer": "CLIPTokenizer",
                "CLIPTokenizerFast": "CLIPTokenizer",
                "AutoTokenizer": "CLIPTokenizer",
                "PreTrainedTokenizerFast": _BACKEND,
                "TokenizersBackend": _BACKEND,
            },
            config="tokenizer_config.json",
            weights=False,
        ),
        "tokenizer_2": Part(
            "transformers",
            {
                "T5TokenizerFast": "T5Tokenizer",
                "T5Tokenizer": "T5Tokenizer",
                "AutoTokenizer": "T5Tokenizer",
                "PreTrainedTokenizerFast": _BACKEND,
                "TokenizersBackend": _BACKEND,
            },
            config="tokenizer_config.json",
            weights=False,
        ),
        "transformer": _only(
            "diffusers",
            "FluxTransformer2DModel",
            layouts=layouts.TRANSFORMER,
            prefixes=layouts.TRANSFORMER_PREFIXES,
        ),
        # The encoder half makes no images.
        "vae": _only(
            "diffusers",
            "AutoencoderKL",
            "AutoencoderTiny",
            ignored=r"^(encoder\.|quant_conv\.|loss\.)",
            layouts=layouts.VAE,
            prefixes=layouts.VAE_PREFIXES,
        ),
    },
    transformer={
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    side=1024,
    sides=(64, 4096),
    token_side=TOKEN_SIDE,
    guidance=3.5,
    steps=4,
    guided_steps=28,
)
