"""Matrix products by quack-kernels, on Hopper, where it is installed: two groups of warps take turns, so that the
epilogue of one (bias, GELU) runs beside the product of the other."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fluxcli.engine.cache import share_cute_caches

# Tiles [rows, outputs] of a group, by the names they have in the table of choices: the two fastest of five that were
# tried at FLUX.1's shapes (jobs/bench/LOG.md).
_TILES = {"quack 128x192": (128, 192), "quack 192x128": (192, 128)}
_HOPPER = 9
_ACTIVATIONS = {"bias": None, "gelu": "gelu_tanh_approx", "add": None}


def choices(device: torch.device) -> tuple[str, ...]:
    """Names for `multiply`; none where there is no such GPU or no such package."""
    return tuple(_TILES) if _kernels(device) else ()


def multiply(choice: str, kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fills y [..., N], contiguous, with x [..., K] times weight [N, K]; `kind` as in `cublaslt.Problem`."""
    product, config = _kernels(x.device)
    rows, outputs = _TILES[choice]
    target = y.flatten(0, -2)
    product(
        x.flatten(0, -2), weight.t(), target if kind == "add" else None, bias, _ACTIVATIONS[kind],
        postact_out=target, store_preact=False, tuned=False,
        config=config(tile_m=rows, tile_n=outputs, pingpong=True, cluster_m=2, is_dynamic_persistent=False),
    )  # fmt: skip


@cache
def _kernels(device: torch.device) -> Any:
    """quack's product with an activation, and the class of its settings."""
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return None
    share_cute_caches()
    try:
        from quack.gemm_config import GemmConfig
        from quack.gemm_interface import gemm_act
    except ImportError:
        return None
    return gemm_act, GemmConfig
