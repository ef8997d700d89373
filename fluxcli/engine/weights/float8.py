"""Weights that a checkpoint holds in 8 bits, and the scales that belong to them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fluxcli.core.errors import ModelError
from fluxcli.engine.matmul.scaled import Scaled, Stored
from fluxcli.models.files import shown
from fluxcli.models.headers import Entry, Header

FLOAT8 = ("F8_E4M3", "F8_E5M2")  # as safetensors names them
Opened = tuple[Path, Header, Any]  # a weight file; last, safetensors' own handle

_OF_WEIGHT = re.compile(r"(.+)\.(?:weight_scale|scale_weight)")
_OF_INPUT = re.compile(r"(.+)\.(?:input_scale|scale_input)")  # ours are made anew for each token
_ABOUT_WEIGHT = re.compile(r"(.+)\.comfy_quant")  # says that it is in float8, which its dtype does
_MARKER = "scaled_fp8"
_DTYPES = ("F32", "F16", "BF16")


class Scales:
    """The scales of all files of a part."""

    def __init__(self, opened: Sequence[Opened]) -> None:
        names = {
            entry.name for _, header, _ in opened for entry in header.entries
            if entry.dtype in FLOAT8 and len(entry.shape) == 2
        }  # fmt: skip
        self._layers = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
        self._found = {
            f"{match[1]}.weight": (path, entry, file)
            for path, header, file in opened
            for entry in header.entries
            if (match := _OF_WEIGHT.fullmatch(entry.name)) and match[1] in self._layers
        }

    def own(self, name: str) -> bool:
        """Whether a tensor is one of them, or says how they were made."""
        match = _OF_WEIGHT.fullmatch(name) or _OF_INPUT.fullmatch(name) or _ABOUT_WEIGHT.fullmatch(name)
        return match[1] in self._layers if match else bool(self._layers) and name == _MARKER

    def applied(self, path: Path, weight: Entry, values: Tensor) -> Stored:
        """A tensor of the file `path` with its scale, if it is to have one.

        Raises:
            ModelError: a scale is lacking, or is none.
        """
        if not self._found or weight.dtype not in FLOAT8 or values.ndim != 2:
            return values
        if weight.name not in self._found:
            raise ModelError(f"{path}: {shown(weight.name)} is in float8 and has no scale, as other weights here have")
        path, entry, file = self._found[weight.name]
        rows = len(values)
        if entry.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or entry.dtype not in _DTYPES:
            raise ModelError(
                f"{path}: {shown(entry.name)} is {entry.dtype} {list(entry.shape)}; the scale of {rows} rows is one "
                f"number, or one for each, in {', '.join(_DTYPES)}"
            )
        scale = file.get_tensor(entry.name).float().flatten()
        if not bool((scale.isfinite() & (scale > 0)).all()):
            wrong = scale[~(scale.isfinite() & (scale > 0))][0].item()
            raise ModelError(f"{path}: {shown(entry.name)} holds {wrong:g}, which is no scale; download it again")
        return Scaled(values, scale.expand(rows).contiguous())
