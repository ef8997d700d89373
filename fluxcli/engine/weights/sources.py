"""Weight files -> named tensors: the only module that opens them for their values. Strict, by name: a missing, surplus
or misshapen tensor is an error that says which, told before anything is copied."""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxcli.core.errors import ModelError, first_line
from fluxcli.models.files import shown
from fluxcli.models.headers import read_header
from fluxcli.models.weight_files import weight_files

# As safetensors names them; anything else is quantised, and so is float8 with scales.
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SHOWN = 3  # tensor names in an error before "and N more"

Slots = Iterable[tuple[str, Tensor]]  # (name in the checkpoint, where its values go)
Pairs = list[tuple[Tensor, Tensor]]  # (where the values go, where they are)


@contextmanager
def paired(slots: Slots, directory: Path, library: str, ignored: str | None = None) -> Iterator[Pairs]:
    """(slot, its values on disk) of every slot; the values are mapped while the block runs.

    Args:
        directory: a part's folder.
        library: whose layout its files have.
        ignored: a pattern of names that the files may hold and nobody reads.

    Raises:
        ModelError: naming the directory and the tensors, if names or shapes differ in any way.
    """
    wanted = {_canonical(name): slot for name, slot in slots}
    pairs: Pairs = []
    found: set[str] = set()
    surplus: list[str] = []
    misshapen: list[str] = []
    with ExitStack() as files:
        for path, _ in weight_files(directory, library):
            header = read_header(path)
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
                for entry in sorted(header.entries, key=lambda entry: entry.name):
                    slot = wanted.get(_canonical(entry.name))
                    if slot is None:
                        if not (ignored and re.search(ignored, _canonical(entry.name))):
                            surplus.append(entry.name)
                        continue
                    found.add(_canonical(entry.name))
                    if entry.shape != tuple(slot.shape):
                        misshapen.append(f"{entry.name} {list(entry.shape)}, expected {list(slot.shape)}")
                    elif entry.dtype not in _FLOATS:
                        raise ModelError(
                            f"{path}: {shown(entry.name)} is {entry.dtype}; fluxcli reads {', '.join(_FLOATS)}"
                        )
                    else:
                        pairs.append((slot, file.get_tensor(entry.name)))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error
        filled = {wanted[name].data_ptr() for name in found}  # tied tensors are there under one name or several
        missing = [name for name, slot in wanted.items() if slot.data_ptr() not in filled]
        # A surplus name beside a missing one tells why: another's names, a compiled module's, an adapter's.
        beside = f" (and it has {shown(min(surplus))}, which fluxcli does not know)" if surplus else ""
        _refuse(directory, "missing", missing, beside)
        _refuse(directory, "surplus", surplus)
        _refuse(directory, "misshapen", misshapen)
        yield pairs


def values(directory: Path, library: str, ignored: str | None = None) -> int:
    """How many numbers a part's files hold, without those that nobody reads."""
    return sum(
        entry.values
        for path, _ in weight_files(directory, library)
        for entry in read_header(path).entries
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
