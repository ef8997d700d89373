"""An adapter's tensors, read from the file that the job looked at, and the difference that each change makes."""

import mmap
from collections.abc import Mapping

import torch
from torch import Tensor

from fluxcli.core.errors import ModelError
from fluxcli.core.records import Adapter
from fluxcli.engine.matmul.scaled import E4M3
from fluxcli.models.adapters.catalog import Catalog, digest, place
from fluxcli.models.adapters.changes import Change
from fluxcli.models.files import open_regular
from fluxcli.models.headers import Entry

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": E4M3,
    "F8_E5M2": torch.float8_e5m2,
}
_LEAST = 1e-30  # a norm that a DoRA divides by


class Read:
    """An adapter, opened: `changes`, and the tensors behind them.

    Raises:
        ModelError: the file is gone, or another than it was.
    """

    def __init__(self, adapter: Adapter, catalog: Catalog) -> None:
        path = place(adapter.path)
        if digest(path) != adapter.sha256:
            raise ModelError(f"{path}: has changed since the job looked at it; put back what was there, and run again")
        self.changes, self.scale = catalog.changes(path), adapter.scale
        with open_regular(path) as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensors(self, change: Change, device: str) -> dict[str, Tensor]:
        """A change's tensors by role, in float32 on `device`."""
        return {role: self._tensor(entry).to(device).float() for role, entry in change.tensors.items()}

    def _tensor(self, entry: Entry) -> Tensor:
        data = torch.frombuffer(self._data, dtype=torch.uint8, offset=entry.start, count=entry.end - entry.start)
        return data.clone().view(_DTYPES[entry.dtype]).view(entry.shape)  # copied: it may lie at any address


def add_(weight: Tensor, change: Change, tensors: Mapping[str, Tensor], scale: float, pristine: Tensor) -> None:
    """Adds a change, `scale` times, to weight [rows, columns] of its target, or to a vector; in float32.

    Args:
        pristine: the same as no adapter has changed it, which a DoRA starts from.
    """
    if change.kind == "lora" and "magnitude" not in tensors:
        weight.addmm_(_ordered(tensors["up"], change), tensors["down"], alpha=scale * change.strength)
        return
    weight.add_(_difference(change, tensors, pristine), alpha=scale)


def _difference(change: Change, tensors: Mapping[str, Tensor], pristine: Tensor) -> Tensor:
    if change.kind in ("diff", "bias"):
        return _ordered(tensors[change.kind], change)
    if change.kind == "lora":
        made = tensors["up"] @ tensors["down"]
    else:
        made = torch.kron(_factor(tensors, "w1"), _factor(tensors, "w2"))
    made = _ordered(made.mul_(change.strength), change)
    magnitude = tensors.get("magnitude")
    if magnitude is None:
        return made
    # Weight-decomposed low-rank adaptation (Liu et al., 2024): the direction of W + BA, with norms of its own.
    moved = made.add_(pristine)
    by_column = magnitude.ndim == 2 and magnitude.shape[0] == 1 != len(moved)
    if not by_column:
        magnitude = _ordered(magnitude.reshape(-1, 1), change)
    norms = moved.norm(dim=0 if by_column else 1, keepdim=True).clamp_min(_LEAST)
    return moved.mul_(magnitude / norms).sub_(pristine)


def _factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    whole = tensors.get(name)
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"] if whole is None else whole


def _ordered(rows: Tensor, change: Change) -> Tensor:
    """Rows as diffusers has them."""
    return torch.cat(rows.chunk(2)[::-1]) if change.target.swapped else rows
