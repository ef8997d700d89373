"""diffusers' FLUX transformer over the very tensors of ours: as it is, as its makers advise to run it, and with its
matmuls in 8 bits by torchao."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fluxcli.bench.inputs import Inputs
from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import DeviceError
from fluxcli.engine.denoise import euler_step
from fluxcli.engine.engine import Engine
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import Flux
from fluxcli.engine.runtime.device import DTYPES
from fluxcli.engine.weights.fill import load_transformer
from fluxcli.models.checkpoints import Checkpoint

# Ours -> diffusers' names, of what both can run without a further package.
_ATTENTION = {"sdpa": "native", "cudnn": "_native_cudnn"}


class Diffusers:
    """`compiled` or eager. Eager keeps diffusers' own choice of attention; compiled blocks get the faster of torch's
    own and cuDNN's, as measured at each shape."""

    def __init__(self, flux: Flux, transformer: Mapping[str, Any], compiled: bool) -> None:
        """`transformer` is the checkpoint's transformer/config.json; `flux` holds its weights in the model's dtype."""
        self.model, self._compiled = twin(flux, transformer), compiled
        self._prepare()
        if compiled:
            # A block is compiled anew for every shape.
            torch._dynamo.config.recompile_limit = 10_000
            torch._dynamo.config.accumulated_recompile_limit = 100_000
            self.model.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def _prepare(self) -> None:
        """What is done to the model before it is compiled."""

    def attend(self, attention_ms: Mapping[str, float]) -> str:
        """Settles the attention of the next shape, and returns diffusers' name of it."""
        known = {name: ms for name, ms in attention_ms.items() if name in _ATTENTION} if self._compiled else {}
        backend = _ATTENTION[min(known, key=lambda name: known[name]) if known else "sdpa"]
        self.model.set_attention_backend(backend)
        return backend

    def step(self, inputs: Inputs, sigma: float, dt: Tensor) -> Callable[[], Tensor]:
        """One step of the loop, the Euler update with it, as a call."""
        arguments = inputs.diffusers(inputs.img, sigma)
        return lambda: euler_step(inputs.img, self.model(**arguments)[0], dt)


class Torchao(Diffusers):
    """Compiled blocks, and every linear layer in 8 bits with a scale for each row: torchao's usual recipe."""

    def _prepare(self) -> None:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        quantize_(self.model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


def check(vs: str | None, config: EngineConfig) -> None:
    """Raises DeviceError where the contestants of a --vs cannot run: before anything is loaded."""
    if vs == "torchao":
        if find_spec("torchao") is None:
            raise DeviceError("--vs torchao: the package torchao is not installed; pip install torchao")
        if not config.device.startswith("cuda"):
            raise DeviceError("--vs torchao: its 8-bit matmuls need a CUDA GPU")


# --vs -> contestants.
PEERS: dict[str, dict[str, Callable[[Flux, Mapping[str, Any]], Diffusers]]] = {
    "diffusers": {
        "diffusers": partial(Diffusers, compiled=False),
        "diffusers-compiled": partial(Diffusers, compiled=True),
    },
    "torchao": {
        "diffusers-compiled": partial(Diffusers, compiled=True),
        "torchao": partial(Torchao, compiled=True),
    },
}


def plain(engine: Engine, checkpoint: Checkpoint) -> Flux:
    """The engine's denoiser; or, where that is in 8 bits, one with the same weights in the model's dtype."""
    if not engine.config.fp8:
        return engine.flux
    config = engine.config
    loading = load_transformer(checkpoint, config.device, DTYPES[config.dtype], Reference())
    with torch.inference_mode(False), loading as flux:  # weights are read by threads that no mode reaches
        pass
    return flux


def denoise(model: nn.Module, inputs: Inputs, sigmas: list[float], dtype: torch.dtype) -> Tensor:
    """The latents in `dtype` after steps from each of `sigmas` to the next, by diffusers' transformer."""
    img = inputs.img.to(dtype)
    for sigma, dt in zip(sigmas[:-1], torch.tensor(sigmas).diff().to(img.device), strict=True):
        img = euler_step(img, model(**inputs.diffusers(img, sigma))[0], dt)
    return img


def twin(flux: Flux, transformer: Mapping[str, Any]) -> Any:
    """diffusers' transformer; its tensors are `flux`'s own, not copies."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(dict(transformer))
    model.load_state_dict(dict(flux.slots()), assign=True)
    model.set_attention_backend("native")
    return model.eval().requires_grad_(False)


class _Float32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def in_float32(model: nn.Module) -> nn.Module:
    """The same model computing in float32: each weight is widened when it is used and no sooner, so that it takes the
    memory of one layer rather than of a second model."""
    for module in list(model.modules()):
        for name, _ in list(module.named_parameters(recurse=False)):
            nn.utils.parametrize.register_parametrization(module, name, _Float32(), unsafe=True)
    return model
