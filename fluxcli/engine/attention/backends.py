"""Softmax attention: the plain reference, and which of the installed libraries runs it on CUDA.

sdpa    torch's own choice; the only one on a CPU
cudnn   cuDNN through torch
fa4     FlashAttention-4, package flash-attn-4 (Hopper, Blackwell), by the fastest of several tiles
fa3     FlashAttention-3, module flash_attn_interface (Hopper)
fa2     FlashAttention-2, package flash-attn
"""

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxcli.core.config import ATTENTION
from fluxcli.core.errors import DeviceError, Remark, first_line
from fluxcli.engine.runtime.compile_cache import share_cute_caches, version
from fluxcli.engine.runtime.tuner import FAULTS, Tuner

Attend = Callable[[Tensor], Tensor]  # qkv [B, S, 3, H, Dh] -> [B, S, H, Dh], contiguous, same dtype

_HOPPER = 9
# Tiles [queries, keys] on Hopper, and what goes with them. Beside its own choice, 128x128, the two that were fastest
# somewhere, at 1024x1024: one at batch 1; one, whose softmax passes through shared memory, at batch 16.
_FA4_TILES: dict[str, dict[str, Any]] = {
    "fa4": {},
    "fa4 128x144": {"tile_mn": (128, 144)},
    "fa4 192x128": {"tile_mn": (192, 128), "num_threads": 512, "mma_pv_is_rs": False},
}
# Module and package of each.
_FLASH = {
    "fa4": ("flash_attn.cute", "flash-attn-4"),
    "fa3": ("flash_attn_interface", "flash-attn-3"),
    "fa2": ("flash_attn", "flash-attn"),
}


def sdpa(qkv: Tensor) -> Tensor:
    """The reference: attention of everything to everything by torch's own choice. qkv [B, S, 3, H, Dh] -> [B, S, H,
    Dh], contiguous."""
    q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def cudnn(qkv: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(qkv)


class Attention:
    """An `Attend` on CUDA: the backend that was asked for, or the fastest for each shape, as the tuner found it.

    Args:
        backend: a name of `ATTENTION`, or "auto".

    Raises:
        DeviceError: the backend that was asked for cannot run here at any shape.
    """

    def __init__(self, backend: str, tuner: Tuner, device: str, dtype: torch.dtype) -> None:
        self._backend, self._tuner = backend, tuner
        self._ways: dict[str, Attend] = {}
        for name in ATTENTION if backend == "auto" else (backend,):
            try:
                self._ways |= _ways(name, device, dtype)
            except _Missing as error:
                if backend != "auto":
                    raise DeviceError(f"--attention {backend}: {error}; use --attention auto") from error
                if error.told:
                    warnings.warn(f"{name} attention is left out: {error}", Remark, stacklevel=2)
        if "sdpa" in self._ways:  # the one that surely runs comes first
            self._ways = {"sdpa": self._ways.pop("sdpa"), **self._ways}
        self._here = ", ".join(dict.fromkeys(map(_release, self._ways)))
        self._latest = next(iter(self._ways))

    def __call__(self, qkv: Tensor) -> Tensor:
        problem = self._problem(qkv)
        attended = self._tuner.run(problem, self.ways(qkv))
        self._latest = self._tuner.table.get(problem, self._latest)
        return attended

    def ways(self, qkv: Tensor) -> Mapping[str, Callable[[], Tensor]]:
        """Every way there is here, for those who measure them; names begin with a backend's."""
        return {name: partial(attend, qkv) for name, attend in self._ways.items()}

    @property
    def latest(self) -> str:
        """The backend that ran last."""
        return self._latest.partition(" ")[0]

    def require(self, batch: int, tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype) -> None:
        """Raises DeviceError where a backend that was asked for cannot run this shape; the device's own failures
        pass."""
        if self._backend == "auto":
            return
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype)
        try:
            next(iter(self._ways.values()))(qkv)
        except FAULTS:
            raise
        except Exception as error:
            raise DeviceError(
                f"--attention {self._backend}: cannot run {heads} heads of {head_dim} over {tokens} tokens here: "
                f"{first_line(error)}; use --attention auto"
            ) from error

    def _problem(self, qkv: Tensor) -> str:
        shape = "x".join(map(str, (*qkv.shape, qkv.stride(1))))
        return f"attention {str(qkv.dtype).removeprefix('torch.')} {shape}; {self._here}"


def check(backend: str, device: str, dtype: torch.dtype) -> None:
    """Raises DeviceError for an explicit choice that cannot run here at any shape: it is never quietly another."""
    if backend != "auto" and not (backend == "sdpa" and not device.startswith("cuda")):
        Attention(backend, Tuner(device), device, dtype)


class _Missing(Exception):
    """Why a backend cannot run here at any shape. `told`: it is installed, and ought to."""

    def __init__(self, reason: str, told: bool = False) -> None:
        super().__init__(reason)
        self.told = told


def _ways(backend: str, device: str, dtype: torch.dtype) -> dict[str, Attend]:
    """The ways that a backend has here, its own choice first."""
    if backend == "sdpa":
        return {"sdpa": sdpa}
    if not device.startswith("cuda"):
        raise _Missing("it needs a CUDA GPU")
    if dtype not in (torch.bfloat16, torch.float16):
        raise _Missing(f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}")
    if backend == "cudnn":
        if not torch.backends.cudnn.is_available():
            raise _Missing("torch has no cuDNN here")
        return {"cudnn": cudnn}
    module, package = _FLASH[backend]
    share_cute_caches()
    try:
        function = importlib.import_module(module).flash_attn_func
        tiles = _fa4_tiles(device) if backend == "fa4" else {}
    except Exception as error:
        raise _Missing(f"its package cannot be imported ({first_line(error)})", version(package) is not None) from error
    return tiles or {backend: partial(_flash, function)}


def _flash(function: Callable[..., Tensor | tuple[Tensor, ...]], qkv: Tensor) -> Tensor:
    result = function(*qkv.unbind(2))
    return result[0] if isinstance(result, tuple) else result


def _fa4_tiles(device: str) -> dict[str, Attend]:
    """FlashAttention-4 with each of the tiles; none where its release or this GPU leaves no choice."""
    forward = getattr(importlib.import_module("flash_attn.cute.interface"), "_flash_attn_fwd", None)
    settings = {name for tile in _FA4_TILES.values() for name in tile}
    if torch.cuda.get_device_capability(device)[0] != _HOPPER or forward is None:
        return {}
    if not settings <= inspect.signature(forward).parameters.keys():
        return {}
    return {name: partial(_flash, partial(forward, **tile)) for name, tile in _FA4_TILES.items()}


def _release(way: str) -> str:
    """Of a way's backend, for the name of a problem: where another is there, the choice is made anew."""
    backend = way.partition(" ")[0]
    if backend not in _FLASH:
        return backend
    try:
        return f"{backend} {metadata.version(_FLASH[backend][1])}"
    except metadata.PackageNotFoundError:
        return backend
