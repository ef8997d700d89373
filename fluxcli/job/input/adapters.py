"""What a row's `lora` means: the adapters of its image, each a file with a scale."""

import json
import math
from typing import Any

from fluxcli.core.config import RowDefaults
from fluxcli.core.errors import ModelError, RowError
from fluxcli.core.records import Adapter, Adapters
from fluxcli.core.terminal import printable_line, show

_MOST = 64  # adapters of one image
_WHAT = 'lora must be a path, or a list of {"path": ..., "scale": ...}'
_MOST_SETS = 4096  # kept as one object for all their rows

_sets: dict[tuple[tuple[str, str, float], ...], Adapters] = {}


def adapters_of(value: Any, defaults: RowDefaults) -> Adapters:
    """The adapters that a row names, in its order; none for an empty list.

    Raises:
        RowError: it names none, or one that the model cannot take.
    """
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("["):  # a list in a table's cell
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise RowError(f"{_WHAT}, got {show(value)}") from None
    several = value if isinstance(value, list) else [value]
    if len(several) > _MOST:
        raise RowError(f"lora must be at most {_MOST} adapters, got {len(several)}")
    found = tuple(_adapter(each, defaults) for each in several)
    if len(_sets) >= _MOST_SETS:
        _sets.clear()
    return _sets.setdefault(tuple((each.path, each.sha256, each.scale) for each in found), found)


def _adapter(value: Any, defaults: RowDefaults) -> Adapter:
    given = {"path": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not given.keys() <= {"path", "scale"}:
        raise RowError(f"{_WHAT}, got {show(value)}")
    path, scale = given.get("path"), given.get("scale", 1.0)
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise RowError(f"{_WHAT}, got {show(value)}")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e30 or math.isnan(scale):
        raise RowError(f"lora: scale must be a finite number, got {show(scale)}")
    try:
        return defaults.adapter(path, float(scale))
    except ModelError as error:
        raise RowError(f"lora: {printable_line(str(error))}") from error
