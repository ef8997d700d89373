"""Single files of weights: which of a model's parts one holds, and under which names. Told by their heads alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError
from fluxcli.core.family import Family, Part
from fluxcli.models import gguf
from fluxcli.models.configs import check_numbers
from fluxcli.models.files import shown
from fluxcli.models.flux1 import layouts
from fluxcli.models.headers import GGUF, Header, read_header
from fluxcli.models.weight_files import Weights, weights_of

SUFFIXES = (".safetensors", ".sft", GGUF)
_PREFIXES = 3  # of names, shown of a file that is none of ours


def weights_in(directory: Path, name: str, part: Part, files: Mapping[str, Path]) -> Weights:
    """Where a part's weights are: in the file given for it, else in its folder.

    Raises:
        ModelError: they are not there, and what is instead.
    """
    if name not in files:
        return weights_of(directory / name, part)
    header = read(files[name])
    found = _found(files[name], header, part)
    if found is None:
        raise ModelError(f"{files[name]}: holds no {name}: it is {_told(header)}")
    return found


def parts_in(path: Path, family: Family) -> list[str]:
    """The names of the parts that a file holds, one at the least.

    Raises:
        ModelError: it holds none, and what it is.
    """
    header = read(path)
    parts = [name for name, part in family.parts.items() if _found(path, header, part)]
    if not parts:
        raise ModelError(f"{path}: holds no part of {family.name}: it is {_told(header)}")
    return parts


def transformer_sizes(path: Path, part: Part) -> dict[str, Any]:
    """What a transformer's file says of transformer/config.json (`layouts.sizes`).

    Raises:
        ModelError: it holds none, or another model's.
    """
    weights = weights_in(path.parent, "transformer", part, {"transformer": path})
    shapes = {entry.name: entry.shape for _, header in weights.heads() for entry in header.entries}
    if kind := layouts.another(shapes):
        raise ModelError(f"{path}: is {kind}")
    found = layouts.sizes(weights.layout, shapes)
    check_numbers(path, found)
    return found


def read(path: Path) -> Header:
    """The head of a file that somebody gave as one of weights.

    Raises:
        ModelError: it is none that can be read.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{path}: is no file of weights that fluxcli reads, which end in {', '.join(SUFFIXES)}")
    header = read_header(path)
    if path.suffix.lower() == GGUF:
        if not gguf.readable():
            raise ModelError(f"{path}: to read GGUF files: pip install 'fluxcli[gguf]'")
        if unknown := next((entry for entry in header.entries if entry.dtype.startswith(gguf.UNKNOWN)), None):
            raise ModelError(f"{path}: {shown(unknown.name)} is {unknown.dtype}, which fluxcli does not read")
    return header


def _found(path: Path, header: Header, part: Part) -> Weights | None:
    names = {entry.name for entry in header.entries}
    for layout in part.layouts:
        for prefix in part.prefixes:
            if f"{prefix}{layout.mark}" in names:
                return Weights(path, [(path, None)], prefix, layout.name)
    return None


def _told(header: Header) -> str:
    names = sorted(entry.name for entry in header.entries)
    if not names:
        return "an empty one"
    return layouts.what(names) or f"none that fluxcli knows, with {', '.join(map(shown, names[:_PREFIXES]))}"
