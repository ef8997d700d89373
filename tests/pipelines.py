"""Small random FLUX pipelines in diffusers layout, of unlike shapes, with the built-in or the real tokenizers."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import fluxcli

TINY = Path(fluxcli.__file__).parent / "models" / "tiny"
SHARED = Path(__file__).parents[2] / "shared"
REAL_DEV = SHARED / "flux" / "FLUX.1-dev"
REAL_SCHNELL = SHARED / "flux" / "FLUX.1-schnell"
PARTI = SHARED / "prompts" / "PartiPrompts.tsv"


@dataclass(frozen=True)
class Shape:
    """What makes one small pipeline unlike another."""

    guidance: bool = True
    head_dim: int = 32
    axes: tuple[int, ...] = (8, 12, 12)
    heads: int = 3
    dual: int = 2
    single: int = 3
    t5_width: int = 48
    clip_width: int = 40

    @property
    def name(self) -> str:
        kind = "dev" if self.guidance else "schnell"
        return f"{kind}-{self.heads}x{self.head_dim}-{self.dual}+{self.single}"


DEV = Shape()
SCHNELL = Shape(guidance=False, head_dim=128, axes=(16, 56, 56), heads=1, dual=1, single=1)
DEEP = Shape(head_dim=128, axes=(16, 56, 56), heads=3, dual=1, single=5)


def build(
    directory: Path,
    shape: Shape,
    real: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: str | int = "10GB",
) -> Path:
    """Writes a pipeline with seeded random weights, with real tokenizers and scheduler if `real`."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizers = REAL_DEV if real else TINY
    directory.mkdir(parents=True, exist_ok=True)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizers / part, directory / part)
    shutil.copy(tokenizers / "model_index.json", directory / "model_index.json")
    if real:
        source = REAL_DEV if shape.guidance else REAL_SCHNELL
        shutil.copytree(source / "scheduler", directory / "scheduler")
    else:
        dynamic = shape.guidance
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=3.0 if dynamic else 1.0).save_pretrained(
            directory / "scheduler"
        )
    clip = json.loads((tokenizers / "text_encoder" / "config.json").read_text())
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip["vocab_size"],
            hidden_size=shape.clip_width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=clip["bos_token_id"],
            eos_token_id=clip["eos_token_id"],
        )
    ).to(dtype).save_pretrained(directory / "text_encoder")
    t5 = json.loads((tokenizers / "text_encoder_2" / "config.json").read_text())
    T5EncoderModel(
        T5Config(
            vocab_size=t5["vocab_size"],
            d_model=shape.t5_width,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    ).to(dtype).save_pretrained(directory / "text_encoder_2")
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=shape.dual,
        num_single_layers=shape.single,
        attention_head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.t5_width,
        pooled_projection_dim=shape.clip_width,
        guidance_embeds=shape.guidance,
        axes_dims_rope=shape.axes,
    )
    _enliven(transformer)
    transformer.to(dtype).save_pretrained(directory / "transformer", max_shard_size=shard_size)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.to(dtype).save_pretrained(directory / "vae")
    return directory


def _enliven(model: torch.nn.Module) -> None:
    """Default initialisation leaves a network whose inputs hardly matter; a test of parity needs one that mixes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)


def partiprompts() -> list[dict[str, str]]:
    """Their rows, as the file has them."""
    with PARTI.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
