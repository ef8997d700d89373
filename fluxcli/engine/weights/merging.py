"""Adapters merged into the weights of a running engine.

In place, W' = W + scale * alpha / rank * B A, summed in float32: captured graphs and compiled code read the same memory
as before, and a step costs nothing more. Always from copies of the weights as they were loaded, on the device where
memory is spare and pinned on the host otherwise: to subtract what was added would leave a little of it each time.
Weights in 8 bits are made anew, scales too, from what the files hold: the difference that an adapter makes is mostly
smaller than a step of theirs, and added to numbers that were rounded before it would be rounded away.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fluxcli.core.records import Adapters
from fluxcli.engine.matmul.scaled import Scaled, Stored, store
from fluxcli.engine.weights.adapters import Read, add_
from fluxcli.engine.weights.copying import values
from fluxcli.engine.weights.fill import read_wide
from fluxcli.engine.weights.sources import Slots
from fluxcli.models.adapters.changes import Change
from fluxcli.models.checkpoints import Checkpoint

_SLAB = 2**28  # bytes allocated at once: pinned memory comes in powers of two


class Name(NamedTuple):
    """A tensor of the checkpoint."""

    part: str
    tensor: str


@dataclass
class _Joint:
    """Tensors that are changed together, their rows one after the other, and what changes them: (change, the first of
    them that it changes, the file it is from)."""

    names: tuple[Name, ...]
    changes: list[tuple[Change, int, Read]] = field(default_factory=list)


class Merged:
    """The weights of an engine, and which adapters are in them.

    Args:
        slots: of each part every tensor that an adapter may change, with its place.
        device: where sums are made.
        spare: bytes of the device that copies may take.
    """

    def __init__(
        self, checkpoint: Checkpoint, slots: Mapping[str, Slots], device: str, dtype: torch.dtype, spare: int
    ) -> None:
        self._checkpoint, self._device, self._dtype = checkpoint, device, dtype
        self._slots = {Name(part, name): slot for part, each in slots.items() for name, slot in each}
        self._room = _Room(device, spare)
        self._loaded: dict[Name, Stored] = {}  # as no adapter has changed them
        self._wide: dict[Name, Tensor] = {}  # of those in 8 bits: what the files hold
        self._changed: set[Name] = set()
        self._now: Adapters | None = ()  # None where a change broke off
        self.swaps = 0

    @property
    def copies(self) -> dict[str, int]:
        """Bytes of weights kept as they were loaded, by where."""
        return dict(self._room.taken)

    @torch.inference_mode()
    def use(self, adapters: Adapters) -> bool:
        """Has the weights be those with `adapters`. Returns whether prompts mean other embeddings now.

        Raises:
            ModelError: a file is gone, or another than it was; the weights are as they were.
        """
        if adapters == self._now:
            return False
        joints = _joints([Read(adapter, self._checkpoint.adapters) for adapter in adapters])
        wanted = {name for joint in joints for name in joint.names}
        touched = self._changed | wanted
        if self._device != "cpu" and any(not values(self._slots[name]).is_cuda for name in touched):
            torch.cuda.synchronize()  # a batch may still read what lives on the host
        self._keep(wanted - self._loaded.keys())
        self._now = None
        for name in self._changed - wanted:
            _copy(self._slots[name], self._loaded[name])
        self._changed |= wanted
        for joint in joints:
            self._merge(joint)
        self._changed, self._now = wanted, adapters
        self.swaps += 1
        return any(name.part != "transformer" or name.tensor.startswith("context_embedder.") for name in touched)

    @torch.inference_mode(False)  # threads fill the copies, which are outside of it
    @torch.no_grad()
    def _keep(self, names: Iterable[Name]) -> None:
        """Copies tensors that were never changed before."""
        wide = {name.tensor for name in names if name not in self._wide and isinstance(self._slots[name], Scaled)}
        if wide:
            read = read_wide(self._checkpoint, wide, self._room.empty, self._device, self._dtype)
            self._wide |= {Name("transformer", tensor): each for tensor, each in read.items()}
        for name in sorted(names):
            copy = self._room.like(self._slots[name])
            _copy(copy, self._slots[name])
            self._loaded[name] = copy

    def _merge(self, joint: _Joint) -> None:
        loaded = [self._wide.get(name, self._loaded[name]) for name in joint.names]
        pristine = torch.cat([values(each).to(self._device, non_blocking=True).float() for each in loaded])
        weight = pristine.clone() if any("magnitude" in change.tensors for change, _, _ in joint.changes) else pristine
        rows = [len(values(each)) for each in loaded]
        for change, index, read in joint.changes:
            own = slice(first := sum(rows[:index]), first + sum(change.target.rows))
            add_(weight[own], change, read.tensors(change, self._device), read.scale, pristine[own])
        for name, part in zip(joint.names, weight.split(rows), strict=True):
            store(self._slots[name], part)


def _joints(adapters: Sequence[Read]) -> list[_Joint]:
    """The changes of all adapters, those of one tensor together. Targets lie within one another or apart, so that the
    largest of those that overlap holds the others."""
    every = [(change, read) for read in adapters for change in read.changes]
    found: list[_Joint] = []
    joint_of: dict[Name, _Joint] = {}
    largest = sorted((change for change, _ in every), key=lambda change: len(change.target.layers), reverse=True)
    for change in largest:
        names = _names(change)
        if names[0] not in joint_of:
            found.append(_Joint(names))
            joint_of |= dict.fromkeys(names, found[-1])
    for change, read in every:  # in the order that the row has them
        names = _names(change)
        joint = joint_of[names[0]]
        joint.changes.append((change, joint.names.index(names[0]), read))
    return found


def _names(change: Change) -> tuple[Name, ...]:
    ending = "bias" if change.kind == "bias" else "weight"
    return tuple(Name(change.target.part, f"{layer}.{ending}") for layer in change.target.layers)


def _copy(target: Stored, source: Stored) -> None:
    """In the same format, bit by bit."""
    if isinstance(target, Scaled) and isinstance(source, Scaled):
        target.values.copy_(source.values, non_blocking=True)
        target.scale.copy_(source.scale, non_blocking=True)
    else:
        values(target).copy_(values(source), non_blocking=True)


class _Room:
    """Memory for copies: of the device as long as some is spare, then pinned memory of the host."""

    def __init__(self, device: str, spare: int) -> None:
        self._device, self._cuda, self._spare = device, device != "cpu", spare
        self._slab = torch.empty(0, dtype=torch.uint8)
        self.taken = {"device": 0, "host": 0}

    def like(self, slot: Stored) -> Stored:
        if isinstance(slot, Scaled):
            return Scaled(*(self.empty(each.shape, each.dtype) for each in slot))
        return self.empty(slot.shape, slot.dtype)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._cuda and size <= self._spare:
            self._spare -= size
            self.taken["device"] += size
            return torch.empty(shape, dtype=dtype, device=self._device)
        self.taken["host"] += size
        if not self._cuda:
            return torch.empty(shape, dtype=dtype)
        whole = -(-size // 64) * 64
        if len(self._slab) < whole:
            self._slab = torch.empty(max(_SLAB, whole), dtype=torch.uint8, pin_memory=True)
        memory, self._slab = self._slab[:whole], self._slab[whole:]
        return memory[:size].view(dtype).view(torch.Size(shape))
