"""Which attention runs: what is installed, what can run here, and the one call the blocks make.

sdpa    torch's own choice; the only one on a CPU
cudnn   cuDNN through torch
fa4     FlashAttention-4, package flash-attn-4 (Hopper, Blackwell), by the fastest of several tiles
fa3     FlashAttention-3, module flash_attn_interface (Hopper)
fa2     FlashAttention-2, package flash-attn
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxcli.core.config import ATTENTION
from fluxcli.core.errors import DeviceError
from fluxcli.engine.runtime import stopwatch, tuner
from fluxcli.engine.runtime.compile_cache import share_cute_caches, version
from fluxcli.engine.runtime.graphs import capture
from fluxcli.engine.runtime.tuner import FAULTS

_CANNOT = (RuntimeError, AssertionError, NotImplementedError)  # how the kernels say that a shape is not theirs
_TURN_S = 0.05
_HOPPER = 9
_ITS_OWN = "fa4"
# Tiles [queries, keys] on Hopper, and what goes with them. Beside its own choice, 128x128, the two that were fastest
# somewhere, at 1024x1024: one at batch 1; one, whose softmax passes through shared memory, at batch 16.
_FA4_TILES: dict[str, dict[str, Any]] = {
    _ITS_OWN: {},
    "fa4 128x144": {"tile_mn": (128, 144)},
    "fa4 192x128": {"tile_mn": (192, 128), "num_threads": 512, "mma_pv_is_rs": False},
}
_FLASH_MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface", "fa2": "flash_attn"}
_FLASH_PACKAGES = ("flash-attn-4", "flash-attn-3", "flash-attn")


def attention(qkv: Tensor, backend: str) -> Tensor:
    """Softmax attention over everything. qkv [B, S, 3, H, Dh] -> [B, S, H, Dh], contiguous, same dtype."""
    if backend == "sdpa":
        return _sdpa(qkv)
    if backend == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _sdpa(qkv)
    if backend == "fa4" and (tiles := _fa4_tiles(qkv.device)):
        return _fa4(qkv, tiles)
    result = _flash(backend)(*qkv.unbind(2))
    return result[0] if isinstance(result, tuple) else result


def _fa4(qkv: Tensor, tiles: dict[str, Callable[..., tuple[Tensor, ...]]]) -> Tensor:
    def run(name: str) -> Tensor:
        return tiles[name](*qkv.unbind(2))[0]

    shape = "x".join(map(str, (*qkv.shape, qkv.stride(1))))
    problem = f"fa4 {str(qkv.dtype).removeprefix('torch.')} {shape}; {_fa4_release()}"
    chosen = tuner.fastest(problem, lambda: {name: partial(run, name) for name in tiles}, qkv.device)
    return run(chosen or _ITS_OWN)


@cache
def _fa4_release() -> str:
    return metadata.version("flash-attn-4")


@cache
def _fa4_tiles(device: torch.device) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """FlashAttention-4 with each of the tiles; none where its release or this GPU leaves no choice."""
    share_cute_caches()
    forward = getattr(importlib.import_module("flash_attn.cute.interface"), "_flash_attn_fwd", None)
    settings = {name for tile in _FA4_TILES.values() for name in tile}
    if torch.cuda.get_device_capability(device)[0] != _HOPPER or forward is None:
        return {}
    if not settings <= inspect.signature(forward).parameters.keys():
        return {}
    return {name: partial(forward, **tile) for name, tile in _FA4_TILES.items()}


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


@cache
def _flash(backend: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    share_cute_caches()
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    function = importlib.import_module(_FLASH_MODULES[backend]).flash_attn_func
    return function


def missing(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run here at any shape; None where it may."""
    if backend == "sdpa":
        return None
    if not device.startswith("cuda"):
        return "it needs a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if backend == "cudnn":
        return None if torch.backends.cudnn.is_available() else "torch has no cuDNN here"
    try:
        _flash(backend)
    except (ImportError, AttributeError) as error:
        return f"its package cannot be imported ({error})"
    return None


def check(backend: str, device: str, dtype: torch.dtype) -> None:
    """An explicit choice that cannot run is an error, never quietly another backend."""
    if backend != "auto" and (reason := missing(backend, device, dtype)):
        raise DeviceError(f"--attention {backend}: {reason}; use --attention auto")


def comparison(*shape: int) -> str:
    """A name for `milliseconds` of this shape: with all that decides which backend is fastest on one machine."""
    releases = [f"{package} {release}" for package in _FLASH_PACKAGES if (release := version(package))]
    return "; ".join(["x".join(map(str, shape)), *releases])


def milliseconds(
    batch: int, tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Time of one attention at this shape, for every backend that runs it, on random data.

    By turns, each for long enough to heat the chip: timed one after the other, the first would win by its clock. As
    graphs, since a step launches nothing by itself.
    """
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype)
    runs: dict[str, stopwatch.Run] = {}
    for backend in ATTENTION:
        if missing(backend, device, dtype) is None:
            run = partial(attention, qkv, backend)
            try:
                run()
            except FAULTS:
                raise
            except _CANNOT:
                continue  # installed, but not for this shape or this GPU
            runs[backend] = capture(run)[0].replay
    times = stopwatch.interleaved(runs, device, _TURN_S)
    return {backend: stopwatch.milliseconds(each) for backend, each in times.items()}


def require(backend: str, batch: int, tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype) -> None:
    """Raises DeviceError where `backend` cannot run this shape; the device's own failures pass."""
    try:
        attention(torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype), backend)
    except FAULTS:
        raise
    except _CANNOT as error:
        raise DeviceError(
            f"--attention {backend}: cannot run {heads} heads of {head_dim} over {tokens} tokens here: "
            f"{str(error).strip().splitlines()[0]}; use --attention auto"
        ) from error
