"""Weight files -> named tensors: the only module that opens them for their values. Strict, by name: a missing, surplus
or misshapen tensor is an error that says which, told before anything is copied.

Weights in float8 may have scales, one for the tensor or one for each row: `NAME.weight_scale` or `NAME.scale_weight`
beside `NAME.weight` (`float8`).
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fluxcli.core.errors import ModelError, first_line
from fluxcli.engine.matmul.scaled import Stored
from fluxcli.engine.weights.copying import Pairs
from fluxcli.engine.weights.copying import values as values_of
from fluxcli.engine.weights.float8 import FLOAT8, Opened, Scales
from fluxcli.models.files import shown
from fluxcli.models.headers import read_header
from fluxcli.models.weight_files import weight_files

# As safetensors names them; anything else is quantised in ways that fluxcli does not know.
_FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
_SHOWN = 3  # tensor names in an error before "and N more"

Slots = Iterable[tuple[str, Stored]]  # (name in the checkpoint, where its values go)


@contextmanager
def paired(slots: Slots, directory: Path, package: str, ignored: str | None = None) -> Iterator[Pairs]:
    """(slot, its values on disk) of every slot; the values are mapped while the block runs.

    Args:
        directory: a part's folder.
        package: whose layout its files have.
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
        opened = [_open(path, files) for path, _ in weight_files(directory, package)]
        scales = Scales(opened)
        for path, header, file in opened:
            for entry in sorted(header.entries, key=lambda entry: entry.name):
                slot = wanted.get(_canonical(entry.name))
                if slot is None:
                    if not (scales.own(entry.name) or (ignored and re.search(ignored, _canonical(entry.name)))):
                        surplus.append(entry.name)
                    continue
                found.add(_canonical(entry.name))
                shape = values_of(slot).shape
                if entry.shape != tuple(shape):
                    misshapen.append(f"{entry.name} {list(entry.shape)}, expected {list(shape)}")
                elif entry.dtype not in _FLOATS:
                    raise ModelError(
                        f"{path}: {shown(entry.name)} is {entry.dtype}; fluxcli reads {', '.join(_FLOATS)}"
                    )
                else:
                    pairs.append((slot, scales.applied(path, entry, file.get_tensor(entry.name))))
        filled = {values_of(wanted[name]).data_ptr() for name in found}  # tied tensors have one name or several
        missing = [name for name, slot in wanted.items() if values_of(slot).data_ptr() not in filled]
        # A surplus name beside a missing one tells why: another's names, a compiled module's, an adapter's.
        beside = f" (and it has {shown(min(surplus))}, which fluxcli does not know)" if surplus else ""
        _refuse(directory, "missing", missing, beside)
        _refuse(directory, "surplus", surplus)
        _refuse(directory, "misshapen", misshapen)
        yield pairs


def _open(path: Path, files: ExitStack) -> Opened:
    header = read_header(path)
    try:
        return path, header, files.enter_context(safe_open(path, framework="pt"))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error


def values(directory: Path, package: str, ignored: str | None = None) -> int:
    """How many numbers a part's files hold, without those that nobody reads."""
    return sum(
        entry.values
        for path, _ in weight_files(directory, package)
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
