"""The FLUX.1 denoiser: 19 dual-stream and 38 single-stream blocks that predict the velocity of image latents.

Names and layout follow the diffusers checkpoint, with differences made where weights load (`slots`). Layers over one
input are one layer: query, key and value of a stream, with the MLP's first in a single block; and the modulation layers
of all blocks, done once per batch rather than in every step. The residual stream travels as `Pending`: a block's last
update is added by the norm of the next.

Shapes: B batch, L text tokens, I image tokens, S = L + I, D = heads * head dim, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcli.core.errors import ModelError
from fluxcli.engine.attention.backends import attention
from fluxcli.engine.layers.ops import (
    add_and_modulate,
    linear,
    linear_and_gelu,
    linear_gelu,
    linear_joined,
    linear_of_two,
    qk_norm_rope,
    timestep_embedding,
)
from fluxcli.engine.layers.residual import Pending

MLP_RATIO = 4  # fixed in FLUX.1; the config does not carry it
TIME_CHANNELS = 256  # likewise: sinusoids of the timestep and guidance embeddings
ROPE_THETA = 10_000  # likewise
DUAL_MODULATIONS = 6  # per stream: shift, scale, gate of attention, then of the MLP
SINGLE_MODULATIONS = 3  # shift, scale, gate
FINAL_MODULATIONS = 2  # scale, shift: in this order in the checkpoint

Slots = Iterator[tuple[str, Tensor]]  # (name in the checkpoint, where its values go)
Rope = tuple[Tensor, Tensor]  # cos, sin [S, Dh / 2]


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
        if sum(parsed.axes_dims_rope) != parsed.attention_head_dim:
            raise ModelError(
                f"{source}: axes_dims_rope {list(parsed.axes_dims_rope)} must add up to "
                f"attention_head_dim {parsed.attention_head_dim}"
            )
        if parsed.patch_size != 1 or parsed.out_channels not in (None, parsed.in_channels):
            raise ModelError(f"{source}: patch_size must be 1 and out_channels equal in_channels")
        return parsed

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def modulations(self) -> int:
        """Modulation vectors [D] of one step, all blocks together."""
        return self.num_layers * 2 * DUAL_MODULATIONS + self.num_single_layers * SINGLE_MODULATIONS + FINAL_MODULATIONS


class Linear(nn.Module):
    """A linear layer whose memory is not initialised: the strict load fills every element."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def slots(self, *names: str, rows: tuple[int, ...] | None = None) -> Slots:
        """The layer's slots under one checkpoint name, or its output rows shared out among several."""
        sizes = rows or (self.weight.shape[0] // len(names),) * len(names)
        for name, weight, bias in zip(names, self.weight.split(sizes), self.bias.split(sizes), strict=True):
            yield f"{name}.weight", weight
            yield f"{name}.bias", bias


class QKNorm(nn.Module):
    """The weights of the RMSNorms over queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(head_dim), requires_grad=False)
        self.key = nn.Parameter(torch.empty(head_dim), requires_grad=False)


class Embedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))

    def slots(self, name: str) -> Slots:
        yield from self.linear_1.slots(f"{name}.linear_1")
        yield from self.linear_2.slots(f"{name}.linear_2")


class Stream(nn.Module):
    """One stream, image or text, of a dual block: its projections around the joint attention, and its MLP."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.qkv = Linear(dim, 3 * dim)
        self.norm = QKNorm(head_dim)
        self.out = Linear(dim, dim)
        self.mlp_up = Linear(dim, MLP_RATIO * dim)
        self.mlp_down = Linear(MLP_RATIO * dim, dim)

    def finish(self, x: Tensor, attended: Tensor, mod: Tensor) -> Pending:
        """The stream's value x with the attention's output [B, S, D] added, and the MLP's still to add."""
        gate, mlp_shift, mlp_scale, mlp_gate = (mod[:, i] for i in range(2, DUAL_MODULATIONS))
        x, normed = add_and_modulate(Pending(x, gate, self.out(attended)), mlp_shift, mlp_scale)
        return Pending(x, mlp_gate, self.mlp_down(linear_gelu(normed, self.mlp_up.weight, self.mlp_up.bias)))

    def slots(self, name: str, qkv: tuple[str, ...], norms: tuple[str, str], out: str, mlp: str) -> Slots:
        yield from self.qkv.slots(*(f"{name}.attn.{each}" for each in qkv))
        yield f"{name}.attn.{norms[0]}.weight", self.norm.query
        yield f"{name}.attn.{norms[1]}.weight", self.norm.key
        yield from self.out.slots(f"{name}.attn.{out}")
        yield from self.mlp_up.slots(f"{name}.{mlp}.net.0.proj")
        yield from self.mlp_down.slots(f"{name}.{mlp}.net.2")


class DualBlock(nn.Module):
    """Text and image keep their own weights and meet in one attention over both."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.img = Stream(dim, head_dim)
        self.txt = Stream(dim, head_dim)

    def forward(self, img: Pending, txt: Pending, pe: Rope, mod: Tensor, backend: str) -> tuple[Pending, Pending]:
        """img [B, I, D], txt [B, L, D], mod [B, 12, D], image first -> the same two, one block on."""
        img_mod, txt_mod = mod[:, :DUAL_MODULATIONS], mod[:, DUAL_MODULATIONS:]
        txt_x, txt_normed = add_and_modulate(txt, txt_mod[:, 0], txt_mod[:, 1])
        img_x, img_normed = add_and_modulate(img, img_mod[:, 0], img_mod[:, 1])
        streams, lengths = (self.txt, self.img), [txt_x.shape[1], img_x.shape[1]]
        qkv = linear_joined([txt_normed, img_normed], [(each.qkv.weight, each.qkv.bias) for each in streams])
        queries, keys = [each.norm.query for each in streams], [each.norm.key for each in streams]
        attended = attention(qk_norm_rope(qkv, lengths, queries, keys, *pe), backend).flatten(2)
        txt_attended, img_attended = attended.split(lengths, dim=1)
        return self.img.finish(img_x, img_attended, img_mod), self.txt.finish(txt_x, txt_attended, txt_mod)

    def slots(self, name: str) -> Slots:
        yield from self.img.slots(name, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff")
        added = ("add_q_proj", "add_k_proj", "add_v_proj")
        yield from self.txt.slots(name, added, ("norm_added_q", "norm_added_k"), "to_add_out", "ff_context")


class SingleBlock(nn.Module):
    """Text and image are one sequence with one set of weights; attention and MLP run side by side."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.qkv_and_mlp_up = Linear(dim, (3 + MLP_RATIO) * dim)
        self.norm = QKNorm(head_dim)
        self.out = Linear((1 + MLP_RATIO) * dim, dim)

    def forward(self, stream: Pending, pe: Rope, mod: Tensor, backend: str) -> Pending:
        """The joint stream [B, S, D], mod [B, 3, D] -> the stream, one block on."""
        shift, scale, gate = mod.unbind(1)
        x, normed = add_and_modulate(stream, shift, scale)
        both = self.qkv_and_mlp_up
        qkv, up = linear_and_gelu(normed, both.weight, both.bias, 3 * self.dim)
        qkv = qk_norm_rope(qkv, [x.shape[1]], [self.norm.query], [self.norm.key], *pe)
        attended = attention(qkv, backend).flatten(2)
        return Pending(x, gate, linear_of_two(attended, up, self.out.weight, self.out.bias))

    def slots(self, name: str) -> Slots:
        names = (*(f"{name}.attn.{each}" for each in ("to_q", "to_k", "to_v")), f"{name}.proj_mlp")
        yield from self.qkv_and_mlp_up.slots(*names, rows=(self.dim,) * 3 + (MLP_RATIO * self.dim,))
        yield f"{name}.attn.norm_q.weight", self.norm.query
        yield f"{name}.attn.norm_k.weight", self.norm.key
        yield from self.out.slots(f"{name}.proj_out")


class Flux(nn.Module):
    """The denoiser. What does not depend on the step has methods of its own: `embed_text`, `modulations`."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        dim, head_dim = config.inner_dim, config.attention_head_dim
        self.x_embedder = Linear(config.in_channels, dim)
        self.context_embedder = Linear(config.joint_attention_dim, dim)
        self.timestep_embedder = Embedder(TIME_CHANNELS, dim)
        self.guidance_embedder = Embedder(TIME_CHANNELS, dim) if config.guidance_embeds else None
        self.text_embedder = Embedder(config.pooled_projection_dim, dim)
        self.modulation = Linear(dim, config.modulations * dim)
        self.transformer_blocks = nn.ModuleList(DualBlock(dim, head_dim) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, head_dim) for _ in range(config.num_single_layers)
        )
        self.proj_out = Linear(dim, config.in_channels)

    def embed_text(self, txt: Tensor) -> Tensor:
        """T5 embeddings [B, L, joint_attention_dim] -> txt [B, L, D]."""
        return self.context_embedder(txt)

    def modulations(self, timesteps: Tensor, guidance: Tensor | None, vec: Tensor) -> Tensor:
        """Every modulation of every given step.

        Args:
            timesteps: [T], sigma * 1000 in float32.
            guidance: [B] guidance scales in float32; None for a model that takes none.
            vec: [B, pooled_projection_dim], CLIP's pooled text.

        Returns:
            [T, B, modulations, D].
        """
        # The detour over t / 1000 * 1000 in the model's dtype is FLUX's own rounding, kept for equal pictures.
        t = timesteps.to(vec.dtype) / 1000 * 1000
        emb = self.timestep_embedder(timestep_embedding(t, TIME_CHANNELS).to(vec.dtype))[:, None]
        if self.guidance_embedder is not None:
            if guidance is None:
                raise ValueError("this model takes a guidance scale")
            g = guidance.to(vec.dtype) * 1000
            emb = emb + self.guidance_embedder(timestep_embedding(g, TIME_CHANNELS).to(vec.dtype))[None]
        emb = emb + self.text_embedder(vec)[None]
        return self.modulation(F.silu(emb)).unflatten(-1, (self.config.modulations, -1))

    def forward(self, img: Tensor, txt: Tensor, pe: Rope, mod: Tensor, backend: str = "sdpa") -> Tensor:
        """One step's velocity. img [B, I, in_channels], txt [B, L, D], mod [B, modulations, D] -> like img."""
        stream, text = Pending(self.x_embedder(img)), Pending(txt)
        start = 0
        for block in self.transformer_blocks:
            stream, text = block(stream, text, pe, mod[:, start : start + 2 * DUAL_MODULATIONS], backend)
            start += 2 * DUAL_MODULATIONS
        stream = Pending(torch.cat((text.settle(), stream.settle()), dim=1))
        for block in self.single_transformer_blocks:
            stream = block(stream, pe, mod[:, start : start + SINGLE_MODULATIONS], backend)
            start += SINGLE_MODULATIONS
        scale, shift = mod[:, start], mod[:, start + 1]
        return self.proj_out(add_and_modulate(stream.tail(txt.shape[1]), shift, scale)[1])

    def slots(self) -> Slots:
        """Every tensor of the checkpoint, by its name there, with the view that holds it here."""
        yield from self.x_embedder.slots("x_embedder")
        yield from self.context_embedder.slots("context_embedder")
        yield from self.timestep_embedder.slots("time_text_embed.timestep_embedder")
        if self.guidance_embedder is not None:
            yield from self.guidance_embedder.slots("time_text_embed.guidance_embedder")
        yield from self.text_embedder.slots("time_text_embed.text_embedder")
        names, rows, dim = [], [], self.config.inner_dim
        for i, block in enumerate(self.transformer_blocks):
            yield from block.slots(f"transformer_blocks.{i}")
            names += [f"transformer_blocks.{i}.norm1.linear", f"transformer_blocks.{i}.norm1_context.linear"]
            rows += [DUAL_MODULATIONS * dim] * 2
        for i, block in enumerate(self.single_transformer_blocks):
            yield from block.slots(f"single_transformer_blocks.{i}")
            names.append(f"single_transformer_blocks.{i}.norm.linear")
            rows.append(SINGLE_MODULATIONS * dim)
        names.append("norm_out.linear")
        rows.append(FINAL_MODULATIONS * dim)
        yield from self.modulation.slots(*names, rows=tuple(rows))
        yield from self.proj_out.slots("proj_out")
