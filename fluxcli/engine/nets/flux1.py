"""The FLUX.1 denoiser: 19 double-stream and 38 single-stream blocks that predict the velocity of image latents.

Names follow Black Forest Labs' model; which tensors of a checkpoint fill which layer is `models.flux1.names`' to say.
Layers over one input are one layer: query, key and value of a stream, with the MLP's first in a single-stream block;
and the modulation layers of all blocks, done once per batch rather than in every step.

Shapes: B batch, L text tokens, I image tokens, S = L + I, D = heads * head dim, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcli.core.errors import ModelError
from fluxcli.engine.attention.backends import Attend
from fluxcli.engine.layers.embedding import MLPEmbedder, timestep_embedding
from fluxcli.engine.layers.linear import MLP, Linear, LinearOfTwo, LinearToTwo, joined
from fluxcli.engine.layers.norm import Modulation
from fluxcli.engine.layers.residual import Residual
from fluxcli.engine.layers.rope import QKNorm, Rope, qk_norm_rope_
from fluxcli.engine.matmul.gemm import Multiply
from fluxcli.engine.matmul.scaled import Scaled
from fluxcli.models.flux1.names import Names, diffusers
from fluxcli.models.flux1.targets import MLP_RATIO, TIME_CHANNELS

ROPE_THETA = 10_000  # fixed in FLUX.1; the config does not carry it

Slots = Iterator[tuple[str, Tensor | Scaled]]  # (name in the checkpoint, where its values go)


@dataclass(frozen=True)
class FluxConfig:
    """The architecture, from transformer/config.json."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool = False
    out_channels: int | None = None
    patch_size: int = 1
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @classmethod
    def from_json(cls, config: dict[str, Any], source: str = "transformer/config.json") -> "FluxConfig":
        """Raises ModelError, naming `source`, for anything that this file does not implement."""
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if unknown := given.keys() - {field.name for field in fields(cls)}:
            raise ModelError(f"{source}: fluxcli does not know {', '.join(sorted(unknown))}")
        try:
            parsed = cls(**{**given, "axes_dims_rope": tuple(given.get("axes_dims_rope", cls.axes_dims_rope))})
        except TypeError as error:
            raise ModelError(f"{source}: {str(error).removeprefix('FluxConfig.__init__() ')}") from error
        return parsed

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def modulations(self) -> int:
        """Modulation vectors [D] of one step, all blocks together."""
        return self.num_layers * 2 * 6 + self.num_single_layers * 3 + 2


@dataclass(frozen=True)
class Step:
    """What every block of one denoising step reads: the rotary tables of all S positions, and the attention."""

    pe: Rope
    attend: Attend


@dataclass(frozen=True)
class DoubleModulation:
    """One stream's of a double-stream block."""

    attn: Modulation
    mlp: Modulation

    @classmethod
    def of(cls, mod: Tensor) -> "DoubleModulation":
        """From [B, 6, D]: shift, scale and gate of the attention, then of the MLP."""
        return cls(Modulation(*mod[:, :3].unbind(1)), Modulation(*mod[:, 3:].unbind(1)))


class SelfAttention(nn.Module):
    """The projections and norms around a double-stream block's joint attention, of one stream."""

    def __init__(self, dim: int, head_dim: int, multiply: Multiply, fp8: bool) -> None:
        super().__init__()
        self.qkv = Linear(dim, 3 * dim, multiply, fp8)
        self.norm = QKNorm(head_dim)
        self.proj = Linear(dim, dim, multiply, fp8)


class DoubleStreamBlock(nn.Module):
    """Text and image keep their own weights and meet in one attention over both."""

    def __init__(self, dim: int, head_dim: int, multiply: Multiply, fp8: bool) -> None:
        super().__init__()
        self._fp8 = fp8
        self.img_attn = SelfAttention(dim, head_dim, multiply, fp8)
        self.img_mlp = MLP(dim, MLP_RATIO * dim, multiply, fp8)
        self.txt_attn = SelfAttention(dim, head_dim, multiply, fp8)
        self.txt_mlp = MLP(dim, MLP_RATIO * dim, multiply, fp8)

    def forward(self, img: Residual, txt: Residual, mod: Tensor, step: Step) -> tuple[Residual, Residual]:
        """img [B, I, D], txt [B, L, D], mod [B, 12, D], image first -> the same two, one block on."""
        img_mod, txt_mod = DoubleModulation.of(mod[:, :6]), DoubleModulation.of(mod[:, 6:])

        txt, txt_normed = txt.norm(txt_mod.attn, self._fp8)
        img, img_normed = img.norm(img_mod.attn, self._fp8)
        qkv = joined([self.txt_attn.qkv, self.img_attn.qkv], [txt_normed, img_normed])
        lengths = [txt.x.shape[1], img.x.shape[1]]
        heads = qk_norm_rope_(qkv, lengths, [self.txt_attn.norm, self.img_attn.norm], step.pe)
        txt_attn, img_attn = step.attend(heads).flatten(2).split(lengths, dim=1)

        img, img_normed = img.add(img_mod.attn.gate, self.img_attn.proj(img_attn)).norm(img_mod.mlp, self._fp8)
        img = img.add(img_mod.mlp.gate, self.img_mlp(img_normed))

        txt, txt_normed = txt.add(txt_mod.attn.gate, self.txt_attn.proj(txt_attn)).norm(txt_mod.mlp, self._fp8)
        txt = txt.add(txt_mod.mlp.gate, self.txt_mlp(txt_normed))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Text and image are one sequence with one set of weights; attention and MLP run side by side."""

    def __init__(self, dim: int, head_dim: int, multiply: Multiply, fp8: bool) -> None:
        super().__init__()
        self._fp8 = fp8
        self.linear1 = LinearToTwo(dim, 3 * dim, MLP_RATIO * dim, multiply, fp8)  # q, k and v; the MLP's up
        self.norm = QKNorm(head_dim)
        self.linear2 = LinearOfTwo((1 + MLP_RATIO) * dim, dim, multiply, fp8)  # the attention's out; the MLP's down

    def forward(self, x: Residual, mod: Tensor, step: Step) -> Residual:
        """The joint stream [B, S, D], mod [B, 3, D] -> the stream, one block on."""
        modulation = Modulation(*mod.unbind(1))
        x, normed = x.norm(modulation, self._fp8)
        qkv, mlp = self.linear1(normed)
        attn = step.attend(qk_norm_rope_(qkv, [qkv.shape[1]], [self.norm], step.pe)).flatten(2)
        return x.add(modulation.gate, self.linear2(attn, mlp))


class Flux(nn.Module):
    """The denoiser. One step is `embed`, `body` and `head`; what does not depend on the step has methods of its own:
    `embed_text`, `modulations`.

    Args:
        multiply: does the matmuls of all layers.
        fp8: the layers of all blocks hold their weights, and take their inputs, in 8 bits; embedders, modulation,
            norms, attention and the final layer do not.
    """

    def __init__(self, config: FluxConfig, multiply: Multiply, fp8: bool = False) -> None:
        super().__init__()
        self.config = config
        dim, head_dim = config.inner_dim, config.attention_head_dim
        self.img_in = Linear(config.in_channels, dim, multiply)
        self.txt_in = Linear(config.joint_attention_dim, dim, multiply)
        self.time_in = MLPEmbedder(TIME_CHANNELS, dim, multiply)
        self.guidance_in = MLPEmbedder(TIME_CHANNELS, dim, multiply) if config.guidance_embeds else None
        self.vector_in = MLPEmbedder(config.pooled_projection_dim, dim, multiply)
        self.modulation = Linear(dim, config.modulations * dim, multiply)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(dim, head_dim, multiply, fp8) for _ in range(config.num_layers)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(dim, head_dim, multiply, fp8) for _ in range(config.num_single_layers)
        )
        self.final_layer = Linear(dim, config.in_channels, multiply)

    def embed_text(self, txt: Tensor) -> Tensor:
        """T5 embeddings [B, L, joint_attention_dim] -> txt [B, L, D]."""
        return self.txt_in(txt)

    def modulations(self, timesteps: Tensor, guidance: Tensor | None, vec: Tensor) -> Tensor:
        """Every modulation of every given step.

        Args:
            timesteps: [T], sigma * 1000 in float32.
            guidance: [B] guidance scales in float32; None for a model that takes none.
            vec: [B, pooled_projection_dim], CLIP's pooled text.

        Returns:
            [T, B, modulations, D].
        """
        # The detour over t / 1000 * 1000 in the model's dtype is FLUX's own rounding, kept for equal images.
        t = timesteps.to(vec.dtype) / 1000 * 1000
        emb = self.time_in(timestep_embedding(t, TIME_CHANNELS).to(vec.dtype))[:, None]
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this model takes a guidance scale")
            g = guidance.to(vec.dtype) * 1000
            emb = emb + self.guidance_in(timestep_embedding(g, TIME_CHANNELS).to(vec.dtype))[None]
        emb = emb + self.vector_in(vec)[None]
        return self.modulation(F.silu(emb)).unflatten(-1, (self.config.modulations, -1))

    def embed(self, img: Tensor) -> Tensor:
        """Latents [B, I, in_channels] -> the image stream [B, I, D]."""
        return self.img_in(img)

    def body(self, img: Tensor, txt: Tensor, mod: Tensor, step: Step) -> Residual:
        """All blocks: the streams [B, I, D] and [B, L, D] -> the image stream after them."""
        double = mod[:, : 12 * len(self.double_blocks)].unflatten(1, (len(self.double_blocks), 12)).unbind(1)
        single = mod[:, 12 * len(self.double_blocks) : -2].unflatten(1, (len(self.single_blocks), 3)).unbind(1)
        image, text = Residual(img), Residual(txt)
        for block, own in zip(self.double_blocks, double, strict=True):
            image, text = block(image, text, own, step)
        both = Residual(torch.cat((text.value(), image.value()), dim=1))
        for block, own in zip(self.single_blocks, single, strict=True):
            both = block(both, own, step)
        return both.tail(txt.shape[1])

    def head(self, img: Residual, mod: Tensor) -> Tensor:
        """The image stream [B, I, D] -> velocity [B, I, in_channels]."""
        scale, shift = mod[:, -2], mod[:, -1]  # in this order in the checkpoint
        return self.final_layer(img.norm(Modulation(shift, scale), fp8=False)[1])

    def compile_blocks(self) -> None:
        """Has torch compile the two block functions. All blocks of a stack have one shape and so share one compiled
        function per ShapeKey; the limit on recompilations is lifted because a job may have many shapes."""
        torch._dynamo.config.recompile_limit = 10_000
        torch._dynamo.config.accumulated_recompile_limit = 100_000
        for block in (*self.double_blocks, *self.single_blocks):
            block.compile(fullgraph=True, dynamic=False)

    def slots(self, names: Names = diffusers) -> Slots:
        """Every tensor of a checkpoint with such names, with the view that holds it here; one whose rows are apart here
        several times, with each part in its own order."""
        for path, sources in names(self.config.num_layers, self.config.num_single_layers, self.config.guidance_embeds):
            layer = self.get_submodule(path)
            if isinstance(layer, QKNorm):
                for source, parameter in zip(sources, (layer.query, layer.key), strict=True):
                    yield f"{source.name}.{source.weight}", parameter
                continue
            assert isinstance(layer, Linear)
            share, first = layer.weight.shape[0] // sum(source.share for source in sources), 0
            for source in sources:
                rows = share * source.share
                parts = [(first, rows)]
                if source.swapped:
                    parts = [(first + rows // 2, rows // 2), (first, rows // 2)]
                for start, length in parts:
                    yield f"{source.name}.{source.weight}", layer.slot(start, length)
                    yield f"{source.name}.bias", layer.bias[start : start + length]
                first += rows
