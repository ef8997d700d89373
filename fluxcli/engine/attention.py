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
from torch.library import custom_op
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxcli.config import ATTENTION
from fluxcli.errors import DeviceError

_CANNOT = (RuntimeError, AssertionError, NotImplementedError)  # how the kernels say that a shape is not theirs
_FLASH_MODULES = {"fa4": "flash_attn.cute", "fa3": "flash_attn_interface", "fa2": "flash_attn"}


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Softmax attention over everything. q, k, v [B, S, H, Dh] -> [B, S, H, Dh], same dtype."""
    if backend == "sdpa":
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)
    return _external(q, k, v, backend)


@custom_op("fluxcli::attention", mutates_args=())
def _external(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    # Opaque to the compiler: these kernels are picked at run time and compiled by others.
    if backend == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).contiguous()
    result = _flash(backend)(q, k, v)
    return result[0] if isinstance(result, tuple) else result


@_external.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@cache
def _flash(backend: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
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
    """Time of one attention at this shape, for every backend that runs it, on random data."""
    q, k, v = _random(batch, tokens, heads, head_dim, device, dtype)
    found: dict[str, float] = {}
    for backend in ATTENTION:
        if missing(backend, device, dtype) is None:
            try:
                found[backend] = _median_ms(partial(attention, q, k, v, backend))
            except _CANNOT:
                continue  # installed, but not for this shape or this GPU
    return found


def require(backend: str, batch: int, tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype) -> None:
    """Raises DeviceError where `backend` cannot run this shape."""
    try:
        q, k, v = _random(batch, tokens, heads, head_dim, device, dtype)
        attention(q, k, v, backend)
    except _CANNOT as error:
        raise DeviceError(
            f"--attention {backend}: cannot run {heads} heads of {head_dim} over {tokens} tokens here: "
            f"{str(error).strip().splitlines()[0]}; use --attention auto"
        ) from error


def _random(batch: int, tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(batch, tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3)]


def _median_ms(run: Callable[[], Tensor]) -> float:
    for _ in range(3):
        run()
    rounds = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            run()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / 5)
    return sorted(rounds)[1]
