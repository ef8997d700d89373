"""Matrix products by quack-kernels, on Hopper, where it is installed: two groups of warps take turns, so that the
epilogue of one (`epilogues`) runs beside the product of the other."""

import warnings
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from fluxcli.core.errors import Remark
from fluxcli.engine.matmul.layout import adjacent
from fluxcli.engine.runtime.compile_cache import share_cute_caches

# Tiles [rows, outputs] of a group, by the names they have in the table of choices: the two fastest of five that were
# tried at FLUX.1's shapes (jobs/bench/LOG.md).
_TILES = {"quack 128x192": (128, 192), "quack 192x128": (192, 128)}
_HOPPER = 9


def choices(device: torch.device) -> tuple[str, ...]:
    """Names for `multiply`; none where there is no such GPU or no such package."""
    return tuple(_TILES) if _package(device) else ()


@cache
def release(device: torch.device) -> str:
    """What `choices` depends on, for the name of a problem."""
    return f"quack {metadata.version('quack-kernels')}" if _package(device) else "no quack"


def multiply(choice: str, kind: str, inputs: Tensor, weight: Tensor, out: Tensor, **operands: Tensor) -> None:
    """Fills out [..., N] with what the epilogue `kind` makes of inputs [..., K] times weight [N, K].

    Args:
        operands: the epilogue's, by name, in the dtype of inputs: a value for each output [N], or out itself.
    """
    epilogues, config = _package(inputs.device)
    rows, outputs = _TILES[choice]
    batches = len(inputs) if inputs.ndim == 3 else 1
    if batches > 1 and not (adjacent(inputs) and adjacent(out)):
        weights = weight.t().expand(batches, -1, -1)
        operands = {name: each if each.ndim > 1 else each.expand(batches, -1) for name, each in operands.items()}
    else:  # one matrix
        weights, inputs, out = weight.t(), inputs.flatten(0, -2), out.flatten(0, -2)
        operands = {name: each.flatten(0, -2) if each.ndim > 1 else each[None] for name, each in operands.items()}
    getattr(epilogues, kind)(
        inputs, weights, out={"D": out}, tuned=False,
        config=config(tile_m=rows, tile_n=outputs, pingpong=True, cluster_m=2, is_dynamic_persistent=False),
        **operands,
    )  # fmt: skip


@cache
def _package(device: torch.device) -> Any:
    """(epilogues, quack's class of settings)."""
    if torch.cuda.get_device_capability(device)[0] != _HOPPER:
        return None
    share_cute_caches()
    try:
        from quack.gemm_config import GemmConfig

        from fluxcli.engine.matmul import epilogues
    except ImportError as error:
        if error.name != "quack":  # it is there
            warnings.warn(f"quack-kernels cannot be imported and is left out: {error}", Remark, stacklevel=2)
        return None
    return epilogues, GemmConfig
