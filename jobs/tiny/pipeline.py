"""Write the built-in pipeline's directory with seeded random weights: `python -m jobs.tiny.pipeline [DIRECTORY]`.

A complete `diffusers.FluxPipeline` in small: training (train.py) starts from these modules and fills the same shapes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from jobs.tiny.scenes import caption_words
from jobs.tiny.vocabulary import CLIP_BOS, CLIP_EOS, CLIP_LENGTH, write_clip_tokenizer, write_t5_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "fluxcli" / "models" / "tiny"
SIZE = 128  # pixels; 8x8 image tokens
STEPS = 10
STEPS_TRIED = [4, 28]  # and those between are as right: the step cache's tables in docs/figures.md
TEXT_WIDTH = 128  # T5's width, the transformer's joint_attention_dim
POOLED_WIDTH = 96  # CLIP's width, the transformer's pooled_projection_dim

# One plain shift for every resolution: rectified flow on few tokens wants its steps spread evenly but for the first.
SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False}

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": [8, 12, 12],
}

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "force_upcast": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

T5 = {
    "d_model": TEXT_WIDTH,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
    "use_cache": False,
}

CLIP = {
    "hidden_size": POOLED_WIDTH,
    "intermediate_size": 2 * POOLED_WIDTH,
    "projection_dim": POOLED_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": CLIP_LENGTH,
}

# Keys that would tell where or by which release a folder was written; none of them changes what it means.
PROVENANCE = ("_name_or_path", "_diffusers_version", "transformers_version", "dtype", "torch_dtype")


def build(directory: Path, seed: int = 0) -> FluxPipeline:
    """A pipeline with random weights, its tokenizers written to `directory`; float32."""
    t5_size = write_t5_tokenizer(directory / "tokenizer_2")
    clip_ids = write_clip_tokenizer(directory / "tokenizer")
    special = {"bos_token_id": clip_ids[CLIP_BOS], "eos_token_id": clip_ids[CLIP_EOS]}
    clip = CLIPTextConfig(**CLIP, **special, pad_token_id=clip_ids[CLIP_EOS], vocab_size=len(clip_ids))
    torch.manual_seed(seed)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(clip),
        tokenizer=CLIPTokenizer.from_pretrained(directory / "tokenizer"),
        text_encoder_2=T5EncoderModel(T5Config(**T5, vocab_size=t5_size)),
        tokenizer_2=T5TokenizerFast.from_pretrained(directory / "tokenizer_2"),
        transformer=FluxTransformer2DModel(**TRANSFORMER),
    )
    look_around(pipeline.text_encoder_2)
    return pipeline


@torch.no_grad()
def look_around(t5: T5EncoderModel) -> None:
    """Have the four heads begin by looking at the word before, the word after, a few before and a few after.

    T5's own first biases are almost even. From there this encoder stays a bag of words for thousands of steps, and
    nothing but CLIP's one vector says which colour belongs to which shape.
    """
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [32, 4], of all layers
    # Rows 1 to 7 are distances back, 17 to 23 as many ahead; 8 and 24 hold what is 8 to 11 words away.
    for head, rows, more in (
        (0, slice(1, 2), 6.0),
        (1, slice(17, 18), 6.0),
        (2, slice(2, 9), 4.0),
        (3, slice(18, 25), 4.0),
    ):
        bias[rows, head] += more


def save(pipeline: FluxPipeline, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write weights and configs beside the tokenizers that `build` wrote; the pipeline is left in `dtype`."""
    pipeline.to(dtype)
    for name in ("scheduler", "vae", "text_encoder", "text_encoder_2", "transformer"):
        getattr(pipeline, name).save_pretrained(directory / name)
    index = {"_class_name": "FluxPipeline"}
    index |= {name: list(pipeline.config[name]) for name in sorted(pipeline.components) if pipeline.config[name][0]}
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    _write_json(directory / "model_index.json", index)
    _write_json(directory / "fluxcli.json", suggestions())
    for path in directory.rglob("*.safetensors"):
        path.chmod(0o644)
    for path in directory.glob("*/*config.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        _write_json(path, {key: value for key, value in data.items() if key not in PROVENANCE})


def suggestions() -> dict[str, Any]:
    """What fluxcli.json says: the defaults of a row, the numbers of steps tried, and the words of captions."""
    defaults = {"width": SIZE, "height": SIZE, "num_inference_steps": STEPS}
    return {**defaults, "steps": STEPS_TRIED, "words": " ".join(sorted(caption_words()))}


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save(build(arguments.directory, arguments.seed), arguments.directory)
    weights = list(arguments.directory.rglob("*.safetensors"))
    for path in weights:
        print(f"{path.stat().st_size / 2**20:6.2f} MiB  {path.relative_to(arguments.directory)}")
    print(f"{sum(path.stat().st_size for path in weights) / 2**20:6.2f} MiB  weights in all")


if __name__ == "__main__":
    main()
