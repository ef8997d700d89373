"""Which attention runs: what is installed, what can run here, and the one call the blocks make.

sdpa    torch's own choice; the only one on a CPU
cudnn   cuDNN through torch
fa4     FlashAttention-4, package flash-attn-4 (Hopper, Blackwell)
fa3     FlashAttention-3, module flash_attn_interface (Hopper)
fa2     FlashAttention-2, package flash-attn
"""

import importlib
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxcli.config import ATTENTION
from fluxcli.engine import timing
from fluxcli.engine.cache import share_cute_caches
from fluxcli.errors import DeviceError

_CANNOT = (RuntimeError, AssertionError, NotImplementedError)  # how the kernels say that a shape is not theirs
_TURN_S = 0.05
_FLASH_MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface", "fa2": "flash_attn"}


def attention(qkv: Tensor, backend: str) -> Tensor:
    """Softmax attention over everything. qkv [B, S, 3, H, Dh] -> [B, S, H, Dh], contiguous, same dtype."""
    if backend == "sdpa":
        return _sdpa(qkv)
    if backend == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _sdpa(qkv)
    result = _flash(backend)(*qkv.unbind(2))
    return result[0] if isinstance(result, tuple) else result


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


def milliseconds(
    batch: int, tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Time of one attention at this shape, for every backend that runs it, on random data.

    By turns, each for long enough to heat the chip: timed one after the other, the first would win by its clock.
    """
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype)
    runs: dict[str, timing.Run] = {}
    for backend in ATTENTION:
        if missing(backend, device, dtype) is None:
            run = partial(attention, qkv, backend)
            try:
                run()
            except _CANNOT:
                continue  # installed, but not for this shape or this GPU
            runs[backend] = run
    times = timing.interleaved(runs, device, _TURN_S)
    return {backend: timing.milliseconds(each) for backend, each in times.items()}


def require(backend: str, batch: int, tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype) -> None:
    """Raises DeviceError where `backend` cannot run this shape."""
    try:
        attention(torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype), backend)
    except _CANNOT as error:
        raise DeviceError(
            f"--attention {backend}: cannot run {heads} heads of {head_dim} over {tokens} tokens here: "
            f"{str(error).strip().splitlines()[0]}; use --attention auto"
        ) from error
