"""A small pipeline's weights written as the files that people have: Black Forest Labs' names, ComfyUI's files of all
parts, GGUF. Each from the diffusers tensors by hand, so that no table of ours is trusted."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models.conftest import WEIGHTS

Tensors = dict[str, torch.Tensor]


def tensors(model: Path, part: str) -> Tensors:
    return load_file(model / part / WEIGHTS[part])


def bfl(given: Tensors) -> Tensors:
    """A transformer in the names of `flux1-dev.safetensors`."""
    made: Tensors = {}

    def put(name: str, *sources: str) -> None:
        for kind in ("weight", "bias"):
            made[f"{name}.{kind}"] = torch.cat([given[f"{source}.{kind}"] for source in sources])

    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    for ours, theirs in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        if f"time_text_embed.{theirs}_embedder.linear_1.weight" in given:
            put(f"{ours}.in_layer", f"time_text_embed.{theirs}_embedder.linear_1")
            put(f"{ours}.out_layer", f"time_text_embed.{theirs}_embedder.linear_2")
    put("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = given[f"norm_out.linear.{kind}"].chunk(2)
        made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat((shift, scale))
    streams = {
        "img": (("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "norm1", "ff"),
        "txt": (
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "norm1_context",
            "ff_context",
        ),
    }
    for block in _blocks(given, "transformer_blocks"):
        theirs, ours = f"transformer_blocks.{block}", f"double_blocks.{block}"
        for stream, (qkv, norms, out, norm, mlp) in streams.items():
            put(f"{ours}.{stream}_attn.qkv", *(f"{theirs}.attn.{each}" for each in qkv))
            put(f"{ours}.{stream}_attn.proj", f"{theirs}.attn.{out}")
            put(f"{ours}.{stream}_mod.lin", f"{theirs}.{norm}.linear")
            put(f"{ours}.{stream}_mlp.0", f"{theirs}.{mlp}.net.0.proj")
            put(f"{ours}.{stream}_mlp.2", f"{theirs}.{mlp}.net.2")
            for name, of in zip(("query", "key"), norms, strict=True):
                made[f"{ours}.{stream}_attn.norm.{name}_norm.scale"] = given[f"{theirs}.attn.{of}.weight"]
    for block in _blocks(given, "single_transformer_blocks"):
        theirs, ours = f"single_transformer_blocks.{block}", f"single_blocks.{block}"
        put(f"{ours}.linear1", *(f"{theirs}.attn.{each}" for each in ("to_q", "to_k", "to_v")), f"{theirs}.proj_mlp")
        put(f"{ours}.linear2", f"{theirs}.proj_out")
        put(f"{ours}.modulation.lin", f"{theirs}.norm.linear")
        for name, of in (("query", "norm_q"), ("key", "norm_k")):
            made[f"{ours}.norm.{name}_norm.scale"] = given[f"{theirs}.attn.{of}.weight"]
    return made


def _blocks(given: Tensors, stack: str) -> range:
    return range(1 + max(int(name.split(".")[1]) for name in given if name.startswith(f"{stack}.")))


def ae(given: Tensors) -> Tensors:
    """A VAE in the names of `ae.safetensors`: where each of ours is, by hand, for four levels."""
    made: Tensors = {}
    for name, tensor in given.items():
        half, _, rest = name.partition(".")
        rest = rest.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        rest = rest.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
        for diffusers, ldm in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            if f"attn_1.{diffusers}." in rest:
                rest = rest.replace(diffusers, ldm)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        for level in range(4):
            rest = rest.replace(f"up_blocks.{level}.", f"up.{3 - level}.").replace(
                f"down_blocks.{level}.", f"down.{level}."
            )
        rest = rest.replace("resnets.", "block.").replace("conv_shortcut", "nin_shortcut")
        rest = rest.replace("upsamplers.0", "upsample").replace("downsamplers.0", "downsample")
        made[f"{half}.{rest.replace('conv_norm_out', 'norm_out')}"] = tensor
    return made


def llama(given: Tensors) -> Tensors:
    """T5's encoder in the names of its GGUF files."""
    names = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    for block in range(2):
        theirs, ours = f"encoder.block.{block}.layer", f"enc.blk.{block}"
        for each in "qkvo":
            names[f"{theirs}.0.SelfAttention.{each}.weight"] = f"{ours}.attn_{each}.weight"
        names[f"{theirs}.0.SelfAttention.relative_attention_bias.weight"] = f"{ours}.attn_rel_b.weight"
        names[f"{theirs}.0.layer_norm.weight"] = f"{ours}.attn_norm.weight"
        names[f"{theirs}.1.layer_norm.weight"] = f"{ours}.ffn_norm.weight"
        for each, of in (("wi_0", "ffn_gate"), ("wi_1", "ffn_up"), ("wo", "ffn_down")):
            names[f"{theirs}.1.DenseReluDense.{each}.weight"] = f"{ours}.{of}.weight"
    return {names[name]: tensor for name, tensor in given.items() if name != "encoder.embed_tokens.weight"}


def save(path: Path, given: Tensors, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in given.items()}, path)
    return path


def all_in_one(model: Path, path: Path, change: Callable[[Tensors], Tensors] = lambda given: given) -> Path:
    """ComfyUI's checkpoint of all parts."""
    clip = {
        f"text_model.{name.removeprefix('text_model.')}": each for name, each in tensors(model, "text_encoder").items()
    }
    parts = {
        "model.diffusion_model.": change(bfl(tensors(model, "transformer"))),
        "text_encoders.clip_l.transformer.": {**clip, "text_projection.weight": torch.randn(40, 40)},
        "text_encoders.t5xxl.transformer.": change(tensors(model, "text_encoder_2")),
        "vae.": ae(tensors(model, "vae")),
    }
    whole = {f"{prefix}{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}
    return save(path, {**whole, "text_encoders.clip_l.logit_scale": torch.ones(())})


def gguf(path: Path, given: Tensors, kind: str) -> Path:
    """With matrices in `kind` where their rows are whole blocks, as city96's tools write them."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    of = GGMLQuantizationType[kind]
    writer = GGUFWriter(str(path), "flux")
    writer.add_array("some.words", ["a", "list", "of", "text"])
    writer.add_array("some.numbers", [1, 2, 3])
    for name, tensor in given.items():
        values = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, quants.quantize(values, of), raw_dtype=of)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(given: Tensors, kind: str) -> Tensors:
    """What such a file stands for."""
    from gguf import GGMLQuantizationType, quants

    of = GGMLQuantizationType[kind]

    def through(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim != 2 or tensor.shape[1] % 32:
            return tensor
        return torch.from_numpy(quants.dequantize(quants.quantize(tensor.float().numpy(), of), of))

    return {name: through(tensor) for name, tensor in given.items()}


def scaled(given: Tensors, scale: str = "scale_weight") -> Tensors:
    """Matrices of the blocks in float8 with a scale each, and what ComfyUI writes beside them."""
    made: Tensors = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in given.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim == 2 and "block" in name and "relative" not in name:
            factor = (tensor.abs().max() / 448).float()
            made |= {name: (tensor / factor).to(torch.float8_e4m3fn), f"{layer}.{scale}": factor.reshape(1)}
            made[f"{layer}.{'scale_input' if scale == 'scale_weight' else 'input_scale'}"] = torch.ones(1)
        else:
            made[name] = tensor
    return made


def unscaled(given: Tensors) -> Tensors:
    """What `scaled` stands for."""
    stored = scaled(given)
    return {
        name: stored[name].float() * stored[f"{name.removesuffix('.weight')}.scale_weight"]
        if stored[name].dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in given.items()
    }
