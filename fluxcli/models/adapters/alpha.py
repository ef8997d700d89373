"""What low-rank differences are divided by: the alpha of a file whose layers have none of their own.

diffusers writes it into the file's metadata, PEFT into adapter_config.json beside adapter_model.safetensors; without
either it is the rank.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError
from fluxcli.models.files import parse_json, read_bytes, shown

_METADATA = "lora_adapter_metadata"
_PEFT = ("adapter_model.safetensors", "adapter_config.json")
_MOST = 2**20  # bytes


def beside(path: Path) -> Path | None:
    """PEFT's config of an adapter, where it has one."""
    if path.name != _PEFT[0]:
        return None
    config = path.with_name(_PEFT[1])
    return config if config.exists() else None


class Alphas:
    """Of one file."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self._source = path
        self._given: dict[str, Any] = {}
        if isinstance(text := metadata.get(_METADATA), str):
            self._given = parse_json(text.encode("utf-8", "replace"), path)
        elif (config := beside(path)) is not None:
            self._source = config
            given = parse_json(read_bytes(config, _MOST), config)
            self._given = {f"transformer.{key}": value for key, value in given.items()}

    def strength(self, part: str, layer: str, rank: int) -> float:
        """What the product of a layer's two matrices is multiplied by.

        Raises:
            ModelError: the config says nothing sensible.
        """
        alpha = self._of(part, layer)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._given.get(f"{part}.use_rslora") is True else rank)

    def _of(self, part: str, layer: str) -> float | None:
        patterns = self._given.get(f"{part}.alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{self._source}: alpha_pattern must be an object")
        for pattern, value in patterns.items():
            name = pattern.removeprefix("^").removesuffix("$")
            if not re.fullmatch(r"[\w.]+", name):
                raise ModelError(f"{self._source}: alpha_pattern {shown(pattern)} is no layer's name")
            if layer == name or layer.endswith(f".{name}"):
                return self._number(value)
        alpha = self._given.get(f"{part}.lora_alpha")
        return None if alpha is None else self._number(alpha)

    def _number(self, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise ModelError(f"{self._source}: lora_alpha must be a number, got {shown(value)}")
        return float(value)
