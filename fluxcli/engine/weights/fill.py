"""A checkpoint's parts, built and filled: from its files, or with made-up values."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fluxcli.core.errors import ModelError, first_line
from fluxcli.engine.layers.linear import Linear
from fluxcli.engine.matmul.gemm import Multiply
from fluxcli.engine.matmul.scaled import Stored
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import Flux, FluxConfig
from fluxcli.engine.runtime.offload import Visitors
from fluxcli.engine.weights.build import build, default_dtype
from fluxcli.engine.weights.copying import copying
from fluxcli.engine.weights.random import fill_random
from fluxcli.engine.weights.sources import paired, values
from fluxcli.models.checkpoints import Checkpoint
from fluxcli.models.flux1.layouts import renamed
from fluxcli.models.flux1.names import TABLES, diffusers

Empty = Callable[[Sequence[int], torch.dtype], Tensor]


@contextmanager
def load_transformer(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, multiply: Multiply, fp8: bool = False
) -> Iterator[Flux]:
    """The denoiser on `device`. Its weights are read straight into the packed layers, in their format, while the block
    runs, and are there when the block ends: the other parts can be loaded meanwhile.

    Args:
        fp8: the blocks' layers are in 8 bits.

    Raises:
        ModelError: naming what is wrong with the config, the files or the tensors.
    """
    path = checkpoint.directory / "transformer" / "config.json"
    config = FluxConfig.from_json(checkpoint.transformer, str(path))
    try:
        with torch.device(device), default_dtype(dtype):
            model = Flux(config, multiply, fp8).eval()
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be built: {first_line(error)}") from error
    if checkpoint.random:
        fill_random(model.slots(), device, dtype)
        yield model
        return
    weights, ignored = checkpoint.weights("transformer"), checkpoint.family.parts["transformer"].ignored
    with paired(model.slots(TABLES[weights.layout]), weights, ignored) as pairs, copying(pairs):
        yield model


def read_wide(
    checkpoint: Checkpoint, names: Collection[str], empty: Empty, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The denoiser's matrices of these names, diffusers', as its files have them, in `dtype`: of a model whose own
    weights are in 8 bits. The rest of the layers of ours that they are part of comes with them.

    Args:
        empty: makes the memory, of a shape and dtype.

    Raises:
        ModelError: what is wrong with the files.
    """
    config = FluxConfig.from_json(checkpoint.transformer)
    with torch.device("meta"), default_dtype(dtype):
        model = Flux(config, Reference())
    for path, sources in diffusers(config.num_layers, config.num_single_layers, config.guidance_embeds):
        if any(f"{source.name}.weight" in names for source in sources):
            layer = model.get_submodule(path)
            assert isinstance(layer, Linear)
            layer.weight = nn.Parameter(empty(layer.weight.shape, dtype), requires_grad=False)
    if checkpoint.random:
        fill_random(model.slots(), device, dtype)
    else:
        weights, ignored = checkpoint.weights("transformer"), checkpoint.family.parts["transformer"].ignored
        with (
            paired(model.slots(TABLES[weights.layout]), weights, ignored) as pairs,
            copying([pair for pair in pairs if not _value(pair[0]).is_meta]),
        ):
            pass
    return {name: each for name, slot in model.slots() if not (each := _value(slot)).is_meta}


def _value(slot: Stored) -> Tensor:
    """Of a layer that is not in 8 bits."""
    assert isinstance(slot, Tensor)
    return slot


def load_part(checkpoint: Checkpoint, part: str, device: str, dtype: torch.dtype, visitors: str | None = None) -> Any:
    """A text encoder or the VAE's decoder: the class that model_index.json names, built on `device` and filled with the
    same strictness.

    Args:
        visitors: the name of a list of blocks that stay in host memory and visit the device while they run.

    Raises:
        ModelError: naming what is wrong with the config, the files or the tensors.
    """
    model = build(checkpoint, part, "cpu" if visitors else device, dtype)
    if visitors:
        blocks = model.get_submodule(visitors)
        Visitors(blocks, device)
        at_home = {id(parameter) for parameter in blocks.parameters()}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in at_home:
                tensor.data = tensor.data.to(device)
    if checkpoint.random:
        # Tied tensors appear once in parameters().
        fill_random(((name, parameter.data) for name, parameter in model.named_parameters()), device, dtype)
    if part == "vae":  # its other half makes no images, and a file may lack it
        model.encoder = model.quant_conv = None
    if checkpoint.random:
        return model
    slots, about = model.state_dict(), checkpoint.family.parts[part]
    # What the class computes itself, and what a checkpoint may hold beside its own.
    computed = [re.escape(name) for name, _ in model.named_buffers() if name not in slots]
    others = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ignored = "|".join([*computed, *others, *([about.ignored] if about.ignored else [])])
    weights = checkpoint.weights(part)
    theirs = renamed(weights.layout, model.config.to_dict() if about.package == "transformers" else model.config)
    with paired(((theirs(name), slot) for name, slot in slots.items()), weights, ignored) as pairs, copying(pairs):
        pass
    return model


def size(checkpoint: Checkpoint, part: str, dtype: torch.dtype, fp8: bool = False) -> int:
    """Bytes of a part's parameters, without memory for them; of the denoiser's with its blocks in 8 bits where `fp8`.

    Counted in its files, which needs no import of its package; on the class that its config builds where there are
    none, where that says which are in 8 bits, and in float16, of which a class makes exceptions.
    """
    fp8 = fp8 and part == "transformer"
    if not (checkpoint.random or fp8) and dtype != torch.float16:
        return dtype.itemsize * values(checkpoint.weights(part), checkpoint.family.parts[part].ignored)
    if part == "transformer":
        config = FluxConfig.from_json(checkpoint.transformer)
        with torch.device("meta"), default_dtype(dtype):
            model: nn.Module = Flux(config, Reference(), fp8)
    else:
        model = build(checkpoint, part, "meta", dtype)
    return sum(parameter.nbytes for parameter in model.parameters())
