"""How far apart two denoisers over the same weights and inputs end up after a few steps."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fluxcli.bench import peers
from fluxcli.bench.inputs import Inputs
from fluxcli.core.records import ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.nets.flux1 import Flux
from fluxcli.engine.runtime.device import DTYPES

STEPS = 4


def parity(
    engine: Engine,
    plain: Flux,
    transformer: Mapping[str, Any],
    key: ShapeKey,
    steps: int = STEPS,
    others: Mapping[str, peers.Diffusers] = MappingProxyType({}),
) -> dict[str, Any]:
    """Relative errors ||a - b|| / ||b|| of the latents after `steps` steps from sigma 1 to 0.

    `ours_to_diffusers` compares with diffusers in the model's dtype; the next say how far both, and `others`, are from
    diffusers in float32; `change_by_denoising` is how far the steps moved the noise: the size that an error is to be
    seen against.

    Args:
        plain: the weights in the model's dtype.
    """
    config = engine.config
    inputs = Inputs(engine.flux, key, config.device, config.dtype)
    sigmas = torch.linspace(1, 0, steps + 1).tolist()
    txt, given = inputs.ours(engine.flux, sigmas)
    ours = engine.denoise(key, inputs.img, txt, given).clone()
    model = peers.twin(plain, transformer)
    also = {name: peers.denoise(peer.model, inputs, sigmas, DTYPES[config.dtype]) for name, peer in others.items()}
    theirs = peers.denoise(model, inputs, sigmas, DTYPES[config.dtype])
    exact = peers.denoise(peers.in_float32(model), inputs, sigmas, torch.float32)
    return {
        **key.told(),
        "steps": steps,
        "ours_to_diffusers": _error(ours, theirs),
        "ours_to_float32": _error(ours, exact),
        "diffusers_to_float32": _error(theirs, exact),
        **{f"{name}_to_float32": _error(other, exact) for name, other in also.items()},
        "change_by_denoising": _error(exact, inputs.img),
    }


def _error(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()
