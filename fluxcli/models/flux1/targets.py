"""What an adapter may change of FLUX.1, under every name that trainers give it.

The denoiser's layers go by diffusers' names, where query, key and value are three, and by Black Forest Labs', where
they are one: a target is one or several layers of diffusers' whose rows follow each other. XLabs names the places
where its processors add. Dots and underscores mean the same (`spelled`): no two names become one by it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fluxcli.models.flux1.names import Source, diffusers

MLP_RATIO = 4  # fixed in FLUX.1; the config does not carry it
TIME_CHANNELS = 256  # likewise: sinusoids of the timestep and guidance embeddings
_NORMS = ("query_norm.scale", "key_norm.scale")
# Our layer of a block -> XLabs' processor, and to how many of its sources that adds.
_XLABS = {
    "img_attn.qkv": ("qkv_lora1", 3),
    "txt_attn.qkv": ("qkv_lora2", 3),
    "img_attn.proj": ("proj_lora1", 1),
    "txt_attn.proj": ("proj_lora2", 1),
    "linear1": ("qkv_lora", 3),
    "linear2": ("proj_lora", 1),
}


class Target(NamedTuple):
    """Layers of one part whose rows follow each other.

    Attributes:
        part: of the pipeline.
        layers: their names in a diffusers directory.
        rows: outputs of each.
        columns: inputs of all; 0 of a norm, whose weight is a vector.
        bias: whether they have one.
        swapped: an adapter has the two halves of the rows in the other order.
    """

    part: str
    layers: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    bias: bool = True
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return (sum(self.rows), self.columns) if self.columns else (sum(self.rows),)


Targets = Mapping[str, Target]  # by a layer's name as `spelled` writes it


def spelled(name: str) -> str:
    """A layer's name in the one spelling that all trainers' can be brought to."""
    return name.replace(".", "_")


def transformer(config: Mapping[str, Any]) -> Targets:
    """The denoiser's, of transformer/config.json with its defaults filled in."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    found: dict[str, Target] = {}

    def add(name: str, sources: Sequence[Source], unit: int, columns: int, swapped: bool = False) -> None:
        layers, rows = tuple(each.name for each in sources), tuple(unit * each.share for each in sources)
        found[spelled(name)] = Target("transformer", layers, rows, columns, columns > 0, swapped)

    shape = (config["num_layers"], config["num_single_layers"], config["guidance_embeds"])
    for ours, sources in diffusers(*shape):
        if ours.endswith("norm"):
            for source, norm in zip(sources, _NORMS, strict=True):
                for name in (source.name, f"{ours}.{norm}"):
                    add(name, [source], config["attention_head_dim"], 0)
            continue
        shares = sum(source.share for source in sources)
        rows, columns = _shape(ours, config, dim, shares)
        unit = rows // shares
        for source in sources:
            add(source.name, [source], unit, columns)
            if ours == "modulation":
                name = _bfl_modulation(source.name)
                add(name, [source], unit, columns, swapped=name.startswith("final_layer"))
        if ours != "modulation":
            add(_bfl(ours), sources, unit, columns)
        kind, number, layer = [*ours.split(".", 2), "", ""][:3]
        if layer in _XLABS:
            processor, first = _XLABS[layer]
            add(f"{kind}.{number}.processor.{processor}", sources[:first], unit, columns)
    return found


def clip(config: Mapping[str, Any]) -> Targets:
    """The matrices of CLIP's blocks."""
    width, hidden = config.get("hidden_size", 512), config.get("intermediate_size", 2048)
    layers = {f"self_attn.{each}": (width, width) for each in ("q_proj", "k_proj", "v_proj", "out_proj")}
    layers |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    names = {
        f"encoder.layers.{block}.{layer}": shape
        for block in range(config.get("num_hidden_layers", 12))
        for layer, shape in layers.items()
    }
    return _plain("text_encoder", names, bias=True)


def t5(config: Mapping[str, Any]) -> Targets:
    """The matrices of T5's blocks."""
    width, hidden = config.get("d_model", 512), config.get("d_ff", 2048)
    inner = config.get("num_heads", 8) * config.get("d_kv", 64)
    layers = {f"layer.0.SelfAttention.{each}": (inner, width) for each in "qkv"}
    layers["layer.0.SelfAttention.o"] = (width, inner)
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    layers |= {f"layer.1.DenseReluDense.{each}": (hidden, width) for each in (("wi_0", "wi_1") if gated else ("wi",))}
    layers["layer.1.DenseReluDense.wo"] = (width, hidden)
    names = {
        f"encoder.block.{block}.{layer}": shape
        for block in range(config.get("num_layers", 6))
        for layer, shape in layers.items()
    }
    return _plain("text_encoder_2", names, bias=False)


def _plain(part: str, names: Mapping[str, tuple[int, int]], bias: bool) -> Targets:
    return {spelled(name): Target(part, (name,), (rows,), columns, bias) for name, (rows, columns) in names.items()}


def _shape(ours: str, config: Mapping[str, Any], dim: int, shares: int) -> tuple[int, int]:
    """Rows and columns of one of our layers; `shares` as its sources count them."""
    outside = {
        "img_in": (dim, config["in_channels"]),
        "txt_in": (dim, config["joint_attention_dim"]),
        "vector_in.in_layer": (dim, config["pooled_projection_dim"]),
        "modulation": (shares * dim, dim),
        "final_layer": (config["in_channels"], dim),
        **dict.fromkeys(("time_in.in_layer", "guidance_in.in_layer"), (dim, TIME_CHANNELS)),
        **dict.fromkeys(("time_in.out_layer", "guidance_in.out_layer", "vector_in.out_layer"), (dim, dim)),
    }
    inside = {
        "qkv": (3 * dim, dim),
        "proj": (dim, dim),
        "up": (MLP_RATIO * dim, dim),
        "down": (dim, MLP_RATIO * dim),
        "linear1": ((3 + MLP_RATIO) * dim, dim),
        "linear2": (dim, (1 + MLP_RATIO) * dim),
    }
    return outside[ours] if ours in outside else inside[ours.rpartition(".")[2]]


def _bfl(ours: str) -> str:
    """Black Forest Labs' name of one of our layers, most of which have it already."""
    if ours == "final_layer":
        return "final_layer.linear"
    return ours.replace("_mlp.up", "_mlp.0").replace("_mlp.down", "_mlp.2")


def _bfl_modulation(name: str) -> str:
    """Of a layer that makes modulations, by its name in diffusers."""
    if name == "norm_out.linear":
        return "final_layer.adaLN_modulation.1"
    kind, number, layer, _ = name.split(".")
    if kind == "single_transformer_blocks":
        return f"single_blocks.{number}.modulation.lin"
    return f"double_blocks.{number}.{'img' if layer == 'norm1' else 'txt'}_mod.lin"
