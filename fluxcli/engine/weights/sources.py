"""Weight files -> named tensors: the only module that opens them for their values. Strict, by name: a missing, surplus
or misshapen tensor is an error that says which, told before anything is copied.

Weights in float8 may have scales, one for the tensor or one for each row: `NAME.weight_scale` or `NAME.scale_weight`
beside `NAME.weight` (`float8`); those of GGUF are made wide while they are copied (`packed`).
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxcli.core.errors import ModelError, first_line
from fluxcli.engine.matmul.scaled import Stored
from fluxcli.engine.weights.copying import Pairs, Source, split
from fluxcli.engine.weights.copying import values as values_of
from fluxcli.engine.weights.float8 import FLOAT8, Opened, Scales
from fluxcli.engine.weights.packed import PackedFile
from fluxcli.models.files import shown
from fluxcli.models.gguf import PACKED
from fluxcli.models.headers import GGUF, Header
from fluxcli.models.weight_files import Weights

# As safetensors and GGUF name them; anything else is quantised in ways that fluxcli does not know.
_FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
_SHOWN = 3  # tensor names in an error before "and N more"

Slots = Iterable[tuple[str, Stored]]  # (name in the checkpoint, where its values go)


@contextmanager
def paired(slots: Slots, weights: Weights, ignored: str | None = None) -> Iterator[Pairs]:
    """(slot, its values on disk) of every slot; the values are mapped while the block runs.

    Args:
        slots: where one name comes several times, its tensor's rows are divided among them in that order.
        ignored: a pattern of names that the files may hold and nobody reads.

    Raises:
        ModelError: naming the folder or file and the tensors, if names or shapes differ in any way.
    """
    wanted: dict[str, list[Stored]] = {}
    for name, slot in slots:
        places = wanted.setdefault(_canonical(name), [])
        if _place(slot) not in map(_place, places):  # tied tensors are one
            places.append(slot)
    pairs: Pairs = []
    found: set[str] = set()
    surplus: list[str] = []
    misshapen: list[str] = []
    with ExitStack() as files:
        opened = [_open(path, header, weights.prefix, files) for path, header in weights.heads()]
        scales = Scales(opened)
        for path, header, file in opened:
            for entry in sorted(header.entries, key=lambda entry: entry.name):
                places = wanted.get(_canonical(entry.name), [])
                if not places:
                    if not (scales.own(entry.name) or (ignored and re.search(ignored, _canonical(entry.name)))):
                        surplus.append(entry.name)
                    continue
                found.add(_canonical(entry.name))
                shape = _shape(places)
                if _squeezed(entry.shape, shape) != shape:
                    misshapen.append(f"{entry.name} {list(entry.shape)}, expected {list(shape)}")
                elif entry.dtype not in _FLOATS and entry.dtype not in PACKED:
                    raise ModelError(
                        f"{path}: {shown(entry.name)} is {entry.dtype}; fluxcli reads {', '.join(_FLOATS)}"
                    )
                else:
                    source: Source = file.get_tensor(entry.name)
                    if isinstance(source, Tensor):
                        source = scales.applied(path, entry, source.reshape(shape))
                    pairs += zip(places, split(source, [len(values_of(place)) for place in places]), strict=True)
        filled = {_place(slot) for name in found for slot in wanted[name]}
        # Tied tensors have one name or several.
        missing = [name for name, places in wanted.items() if not filled.issuperset(map(_place, places))]
        # A surplus name beside a missing one tells why: another's names, a compiled module's, an adapter's.
        beside = f" (and it has {shown(min(surplus))}, which fluxcli does not know)" if surplus else ""
        _refuse(weights.where, "missing", missing, beside)
        _refuse(weights.where, "surplus", surplus)
        _refuse(weights.where, "misshapen", misshapen)
        yield pairs


def _place(slot: Stored) -> tuple[int, int]:
    """Equal for tied tensors alone; on the meta device too, where all lie at the same address."""
    tensor = values_of(slot)
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _shape(places: list[Stored]) -> tuple[int, ...]:
    first, *others = (tuple(values_of(place).shape) for place in places)
    return (first[0] + sum(other[0] for other in others), *first[1:]) if others else first


def _squeezed(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """A matrix that is stored as a convolution of 1 x 1, as a matrix."""
    return shape[:2] if len(wanted) == 2 and len(shape) == 4 and shape[2:] == (1, 1) else shape


class _Safetensors:
    """safetensors' own handle, for names without their prefix."""

    def __init__(self, handle: Any, prefix: str) -> None:
        self._handle, self._prefix = handle, prefix

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(self._prefix + name)
        return tensor


def _open(path: Path, header: Header, prefix: str, files: ExitStack) -> Opened:
    if path.suffix.lower() == GGUF:
        return path, header, PackedFile(path, header)
    try:
        return path, header, _Safetensors(files.enter_context(safe_open(path, framework="pt")), prefix)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error


def values(weights: Weights, ignored: str | None = None) -> int:
    """How many numbers a part's files hold, without those that nobody reads."""
    return sum(
        entry.values
        for _, header in weights.heads()
        for entry in header.entries
        if not (ignored and re.search(ignored, _canonical(entry.name)))
    )


def _canonical(name: str) -> str:
    """CLIP's files have a level `text_model` that transformers' class had once and lacks now."""
    return name.removeprefix("text_model.")


def _refuse(where: Path, what: str, names: Iterable[str], beside: str = "") -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        raise ModelError(f"{where}: {what}: {', '.join(map(shown, listed[:_SHOWN]))}{more}{beside}")
