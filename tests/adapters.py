"""Adapters for the small pipelines, in every form that trainers write, each with the differences that it stands for:
by diffusers' names, and worked out here, so that no table of fluxcli's is trusted."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK = 3
Differences = dict[tuple[str, str], Tensor]  # (part, tensor) -> what is added to it

PARTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}


@dataclass
class Made:
    """A file's tensors, its metadata, and what they mean at scale 1."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    differences: Differences = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        save_file({name: each.contiguous() for name, each in self.tensors.items()}, path, self.metadata or None)
        return path

    def __add__(self, other: "Made") -> "Made":
        return Made(self.tensors | other.tensors, self.differences | other.differences)


class Maker:
    """Of one pipeline, seeded."""

    def __init__(self, directory: Path, seed: int = 0) -> None:
        self.weights = {part: load_file(directory / file) for part, file in PARTS.items()}
        self.generator = torch.Generator().manual_seed(seed)

    def matrices(self, part: str = "transformer") -> list[str]:
        """Layers with a matrix, by their names in a diffusers directory."""
        skipped = ("embed", "shared", "relative_attention", "position")
        weights = self.weights[part].items()
        if part == "transformer":
            skipped = ()
        return [
            name.removesuffix(".weight") for name, each in weights
            if each.ndim == 2 and name.endswith(".weight") and not any(word in name for word in skipped)
        ]  # fmt: skip

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def shape(self, layers: Iterable[str], part: str = "transformer") -> tuple[int, int]:
        each = [self.weights[part][f"{layer}.weight"].shape for layer in layers]
        return sum(shape[0] for shape in each), each[0][1]

    def pair(self, layers: Iterable[str], part: str = "transformer", rank: int = RANK) -> tuple[Tensor, Tensor]:
        """(down, up), of an effect that is seen."""
        rows, columns = self.shape(layers, part)
        return self.drawn(rank, columns) * columns**-0.5, self.drawn(rows, rank) * 0.4 * rank**-0.5

    def split(self, layers: Iterable[str], difference: Tensor, part: str = "transformer") -> Differences:
        """A difference of rows one after the other, by tensor."""
        rows = [len(self.weights[part][f"{layer}.weight"]) for layer in layers]
        return {(part, f"{name}.weight"): each for name, each in zip(layers, difference.split(rows), strict=True)}

    def made(
        self,
        layers: Mapping[str, list[str]],
        key: Callable[[str], str],
        down: str = "lora_A.weight",
        up: str = "lora_B.weight",
        alpha: float | None = None,
        part: str = "transformer",
        rank: int = RANK,
    ) -> Made:
        """A LoRA of these layers: their names in the file -> those of diffusers that they stand for."""
        made = Made()
        for name, ours in layers.items():
            a, b = self.pair(ours, part, rank)
            made.tensors |= {f"{key(name)}.{down}": a, f"{key(name)}.{up}": b}
            if alpha is not None:
                made.tensors[f"{key(name)}.alpha"] = torch.tensor(alpha)
            difference = (b @ a) * (1 if alpha is None else alpha / rank)
            if name.endswith("adaLN_modulation.1"):  # Black Forest Labs have shift before scale
                difference = torch.cat(difference.chunk(2)[::-1])
            made.differences |= self.split(ours, difference, part)
        return made

    def diffusers(self, words: str = "") -> dict[str, list[str]]:
        return {name: [name] for name in self.matrices() if words in name}

    def bfl(self) -> dict[str, list[str]]:
        """Black Forest Labs' layers, written out."""
        time = "time_text_embed"
        found = {
            "img_in": ["x_embedder"],
            "txt_in": ["context_embedder"],
            "time_in.in_layer": [f"{time}.timestep_embedder.linear_1"],
            "time_in.out_layer": [f"{time}.timestep_embedder.linear_2"],
            "guidance_in.in_layer": [f"{time}.guidance_embedder.linear_1"],
            "guidance_in.out_layer": [f"{time}.guidance_embedder.linear_2"],
            "vector_in.in_layer": [f"{time}.text_embedder.linear_1"],
            "vector_in.out_layer": [f"{time}.text_embedder.linear_2"],
            "final_layer.adaLN_modulation.1": ["norm_out.linear"],
            "final_layer.linear": ["proj_out"],
        }
        for block in self.blocks("transformer_blocks"):
            theirs, ours = f"double_blocks.{block}", f"transformer_blocks.{block}"
            found |= {
                f"{theirs}.img_mod.lin": [f"{ours}.norm1.linear"],
                f"{theirs}.txt_mod.lin": [f"{ours}.norm1_context.linear"],
                f"{theirs}.img_attn.qkv": [f"{ours}.attn.to_{each}" for each in "qkv"],
                f"{theirs}.txt_attn.qkv": [f"{ours}.attn.add_{each}_proj" for each in "qkv"],
                f"{theirs}.img_attn.proj": [f"{ours}.attn.to_out.0"],
                f"{theirs}.txt_attn.proj": [f"{ours}.attn.to_add_out"],
                f"{theirs}.img_mlp.0": [f"{ours}.ff.net.0.proj"],
                f"{theirs}.img_mlp.2": [f"{ours}.ff.net.2"],
                f"{theirs}.txt_mlp.0": [f"{ours}.ff_context.net.0.proj"],
                f"{theirs}.txt_mlp.2": [f"{ours}.ff_context.net.2"],
            }
        for block in self.blocks("single_transformer_blocks"):
            theirs, ours = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
            found |= {
                f"{theirs}.modulation.lin": [f"{ours}.norm.linear"],
                f"{theirs}.linear1": [*(f"{ours}.attn.to_{each}" for each in "qkv"), f"{ours}.proj_mlp"],
                f"{theirs}.linear2": [f"{ours}.proj_out"],
            }
        return found

    def xlabs(self) -> dict[str, list[str]]:
        bfl, found = self.bfl(), {}
        names = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1",
                 "txt_attn.proj": "proj_lora2"}  # fmt: skip
        for block in self.blocks("transformer_blocks"):
            for layer, name in names.items():
                found[f"double_blocks.{block}.processor.{name}"] = bfl[f"double_blocks.{block}.{layer}"]
        for block in self.blocks("single_transformer_blocks"):
            found[f"single_blocks.{block}.processor.qkv_lora"] = bfl[f"single_blocks.{block}.linear1"][:3]
            found[f"single_blocks.{block}.processor.proj_lora"] = bfl[f"single_blocks.{block}.linear2"]
        return found

    def blocks(self, stack: str) -> list[int]:
        return sorted({int(name.split(".")[1]) for name in self.weights["transformer"] if name.startswith(f"{stack}.")})

    def text(self, part: str) -> dict[str, list[str]]:
        return {name: [name] for name in self.matrices(part)}


def plain(prefix: str) -> Callable[[str], str]:
    return lambda name: f"{prefix}{name}"


def underscored(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


_KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
_XLABS = {"down": "down.weight", "up": "up.weight"}

# What each trainer or program writes.
FORMATS: dict[str, Callable[[Maker], Made]] = {
    "diffusers, attention": lambda m: m.made(m.diffusers("attn"), plain("transformer.")),
    "diffusers, every layer": lambda m: m.made(m.diffusers(), plain("transformer.")),
    "diffusers, older": lambda m: m.made(
        m.diffusers("attn"), plain("transformer."), "lora.down.weight", "lora.up.weight"
    ),
    "peft": lambda m: m.made(m.diffusers(), plain("base_model.model.")),
    "peft, adapter named": lambda m: m.made(
        m.diffusers(), plain("base_model.model."), "lora_A.default.weight", "lora_B.default.weight"
    ),
    "diffusers' names, no prefix": lambda m: m.made(m.diffusers(), plain("")),
    "diffusers' names, diffusion_model": lambda m: m.made(m.diffusers(), plain("diffusion_model.")),
    "ai-toolkit": lambda m: m.made(m.diffusers(), plain("transformer."), alpha=6.0),
    "kohya": lambda m: m.made(m.bfl(), underscored("lora_unet_"), alpha=2.0, **_KOHYA),
    "kohya, no alpha": lambda m: m.made(m.bfl(), underscored("lora_unet_"), **_KOHYA),
    "kohya, final layer": lambda m: m.made(
        {name: each for name, each in m.bfl().items() if "final" in name},
        underscored("lora_unet_"),
        alpha=2.0,
        **_KOHYA,
    ),
    "comfyui": lambda m: m.made(m.bfl(), plain("diffusion_model."), alpha=2.0, **_KOHYA),
    "bfl": lambda m: m.made(m.bfl(), plain("")),
    "bfl, diffusion_model": lambda m: m.made(m.bfl(), plain("diffusion_model.")),
    "fal": lambda m: m.made(m.bfl(), plain("base_model.model.")),
    "onetrainer": lambda m: m.made(m.diffusers(), underscored("lora_transformer_"), alpha=3.0, **_KOHYA),
    "xlabs": lambda m: m.made(m.xlabs(), plain(""), **_XLABS),
}
FORMATS["one file, rank by layer"] = lambda m: sum(
    (
        m.made({name: [name]}, plain("transformer."), rank=1 + number % 4)
        for number, name in enumerate(m.diffusers("attn"))
    ),
    Made(),
)
TEXT_FORMATS: dict[str, Callable[[Maker], Made]] = {
    "kohya": lambda m: (
        m.made(m.text("text_encoder"), underscored("lora_te1_"), alpha=6.0, part="text_encoder", **_KOHYA)
        + m.made(m.text("text_encoder_2"), underscored("lora_te3_"), alpha=6.0, part="text_encoder_2", **_KOHYA)
    ),
    "diffusers": lambda m: (
        m.made(m.text("text_encoder"), plain("text_encoder."), part="text_encoder")
        + m.made(m.text("text_encoder_2"), plain("text_encoder_2."), part="text_encoder_2")
    ),
    "comfyui": lambda m: (
        m.made(m.text("text_encoder"), plain("text_encoders.clip_l.transformer."), part="text_encoder")
        + m.made(m.text("text_encoder_2"), plain("text_encoders.t5xxl.transformer."), part="text_encoder_2")
    ),
    "onetrainer": lambda m: (
        m.made(m.text("text_encoder"), underscored("lora_te1_"), alpha=3.0, part="text_encoder", **_KOHYA)
        + m.made(m.text("text_encoder_2"), underscored("lora_te2_"), alpha=3.0, part="text_encoder_2", **_KOHYA)
    ),
}


def reference(directory: Path, rows: list, *added: tuple[Differences, float], dtype=torch.float32) -> np.ndarray:
    """FluxPipeline's images, these differences times their scales added to its weights."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(directory, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    add(pipe, *added)
    return np.stack(
        [
            np.asarray(
                pipe(
                    row.prompt, width=row.width, height=row.height, num_inference_steps=row.num_inference_steps,
                    guidance_scale=row.guidance_scale or 0.0, max_sequence_length=row.text_length,
                    generator=torch.Generator("cpu").manual_seed(row.seed),
                ).images[0]
            )
            for row in rows
        ]
    )  # fmt: skip


@torch.no_grad()
def add(pipe: object, *added: tuple[Differences, float]) -> None:
    for differences, scale in added:
        for (part, name), difference in differences.items():
            weights = getattr(pipe, part).state_dict()
            found = [key for key in weights if key.removeprefix("text_model.") == name.removeprefix("text_model.")]
            assert len(found) == 1, name
            weights[found[0]] += scale * difference
