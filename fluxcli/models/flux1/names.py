"""Which tensors of a checkpoint fill which layer of `engine.nets.flux1`: a table for diffusers' names, and one for
Black Forest Labs' own, which single files have.

A layer that is several of the checkpoint's holds their output rows one after the other, each its share of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple


class Source(NamedTuple):
    """A layer of the checkpoint: `name`.weight (a norm's may be called otherwise), and `name`.bias where ours has one.
    One that is `swapped` has the two halves of its outputs the other way round."""

    name: str
    share: int = 1
    weight: str = "weight"
    swapped: bool = False


Table = Iterator[tuple[str, Sequence[Source]]]  # (our layer, what fills it)
Names = Callable[[int, int, bool], Table]  # of so many double- and single-stream blocks, with guidance or not

_EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm": ("attn.norm_q", "attn.norm_k"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.up": ("ff.net.0.proj",),
    "img_mlp.down": ("ff.net.2",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm": ("attn.norm_added_q", "attn.norm_added_k"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.up": ("ff_context.net.0.proj",),
    "txt_mlp.down": ("ff_context.net.2",),
}
_SINGLE = {
    "linear1": (Source("attn.to_q"), Source("attn.to_k"), Source("attn.to_v"), Source("proj_mlp", 4)),
    "norm": (Source("attn.norm_q"), Source("attn.norm_k")),
    "linear2": (Source("proj_out"),),
}


def diffusers(double: int, single: int, guidance: bool) -> Table:
    """The names of diffusers' FluxTransformer2DModel."""
    yield "img_in", [Source("x_embedder")]
    yield "txt_in", [Source("context_embedder")]
    for ours, theirs in _EMBEDDERS.items():
        if guidance or ours != "guidance_in":
            yield f"{ours}.in_layer", [Source(f"time_text_embed.{theirs}.linear_1")]
            yield f"{ours}.out_layer", [Source(f"time_text_embed.{theirs}.linear_2")]
    modulation = []  # the layers of all blocks are one of ours
    for block in range(double):
        name = f"transformer_blocks.{block}"
        for ours, layers in _DOUBLE.items():
            yield f"double_blocks.{block}.{ours}", [Source(f"{name}.{layer}") for layer in layers]
        modulation += [Source(f"{name}.norm1.linear", 6), Source(f"{name}.norm1_context.linear", 6)]
    for block in range(single):
        name = f"single_transformer_blocks.{block}"
        for ours, sources in _SINGLE.items():
            yield f"single_blocks.{block}.{ours}", [Source(f"{name}.{each.name}", each.share) for each in sources]
        modulation.append(Source(f"{name}.norm.linear", 3))
    yield "modulation", [*modulation, Source("norm_out.linear", 2)]
    yield "final_layer", [Source("proj_out")]


def bfl(double: int, single: int, guidance: bool, norm: str = "scale") -> Table:
    """The names of Black Forest Labs' own model, which are those of ours but for the modulations, of which each block
    has its own there. `norm` is what the weights of norms are called."""
    for ours in ("img_in", "txt_in"):
        yield ours, [Source(ours)]
    for ours in ("time_in", "guidance_in", "vector_in"):
        if guidance or ours != "guidance_in":
            for layer in ("in_layer", "out_layer"):
                yield f"{ours}.{layer}", [Source(f"{ours}.{layer}")]
    modulation = []
    for block in range(double):
        name = f"double_blocks.{block}"
        for stream in ("img", "txt"):
            for layer in ("attn.qkv", "attn.proj"):
                yield f"{name}.{stream}_{layer}", [Source(f"{name}.{stream}_{layer}")]
            yield f"{name}.{stream}_attn.norm", _bfl_norm(f"{name}.{stream}_attn", norm)
            for ours, theirs in (("up", "0"), ("down", "2")):
                yield f"{name}.{stream}_mlp.{ours}", [Source(f"{name}.{stream}_mlp.{theirs}")]
            modulation.append(Source(f"{name}.{stream}_mod.lin", 6))
    for block in range(single):
        name = f"single_blocks.{block}"
        for layer in ("linear1", "linear2"):
            yield f"{name}.{layer}", [Source(f"{name}.{layer}")]
        yield f"{name}.norm", _bfl_norm(name, norm)
        modulation.append(Source(f"{name}.modulation.lin", 3))
    yield "modulation", [*modulation, Source("final_layer.adaLN_modulation.1", 2, swapped=True)]
    yield "final_layer", [Source("final_layer.linear")]


def _bfl_norm(name: str, weight: str) -> list[Source]:
    return [Source(f"{name}.norm.{of}_norm", weight=weight) for of in ("query", "key")]


# By layout: "comfy" is Black Forest Labs' as ComfyUI saves it.
TABLES: Mapping[str, Names] = {"diffusers": diffusers, "bfl": bfl, "comfy": partial(bfl, norm="weight")}
