"""--step-cache: what its text means, and the ratios behind a preset: a calibration file's, the model's own, or those
that diffusers publishes for FLUX.1-dev. Read without diffusers or torch, which take seconds to import."""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fluxcli.core.config import MAX_STEPS
from fluxcli.core.errors import ModelError, UsageError
from fluxcli.core.files import replacing
from fluxcli.core.step_cache import OFF, PRESETS, StepCache
from fluxcli.models.checkpoints import Checkpoint
from fluxcli.models.files import parse_json, read_bytes, shown

OWN = "step_cache.json"  # in a model's directory, as `fluxcli calibrate` writes it
_MOST = 2**17  # bytes of such a file: a thousand ratios and some
_SOURCE = ("hooks", "mag_cache.py")  # in diffusers
_RATIOS = "FLUX_MAG_RATIOS"
_LOW, _HIGH = 1e-3, 1e3  # what a ratio may be
_MASK = re.compile(rf"1[01]{{0,{MAX_STEPS - 1}}}")


def parse(text: str) -> StepCache:
    """off, a preset, FILE:PRESET or a mask; a preset without a file has no ratios yet.

    Raises:
        UsageError: it is none of them.
        ModelError: what is wrong with the file.
    """
    name = text.strip().lower()
    if name == OFF.name:
        return OFF
    if name in PRESETS or _MASK.fullmatch(name):
        return StepCache(name)
    file, colon, preset = text.rpartition(":")
    if colon and file and preset.lower() in PRESETS:
        if not Path(file).exists():
            raise UsageError(f"--step-cache: there is no file {shown(file)}; fluxcli calibrate writes one")
        return StepCache(preset.lower(), read(Path(file)))
    if set(name) <= {"0", "1"} and name:
        reason = "must begin with 1" if name[0] == "0" else f"may have at most {MAX_STEPS} steps"
        raise UsageError(f"--step-cache: a mask {reason}")
    raise UsageError(
        f"--step-cache {shown(text)}: give off, {', '.join(PRESETS)}, FILE:PRESET with a file of fluxcli calibrate, or "
        "a mask of 0 and 1"
    )


def settled(wanted: StepCache, checkpoint: Checkpoint) -> StepCache:
    """`wanted` with the ratios of this model.

    Raises:
        UsageError: it is not for this model.
        ModelError: the ratios cannot be read.
    """
    if wanted.name in PRESETS and not checkpoint.takes_guidance:
        raise UsageError(
            f"--step-cache {wanted.name}: {checkpoint.name} is distilled for few steps, each unlike the last, and none "
            "can be spared; a mask of 0 and 1 says which to reuse all the same"
        )
    if wanted.name in PRESETS and not wanted.ratios:
        own = checkpoint.directory / OWN
        return replace(wanted, ratios=read(own) if own.exists() else published())
    return wanted


def read(path: Path) -> tuple[float, ...]:
    """The ratios of a file that `write` wrote, or of one that pretends to be such.

    Raises:
        ModelError: what is wrong with it.
    """
    ratios = parse_json(read_bytes(path, _MOST), path).get("ratios")
    if not isinstance(ratios, list) or not 2 <= len(ratios) <= MAX_STEPS:
        raise ModelError(f"{path}: ratios must be a list of 2 to {MAX_STEPS} numbers; fluxcli calibrate writes one")
    return _checked(path, ratios)


def write(path: Path, model: str, images: int, ratios: Sequence[float]) -> None:
    """A calibration, of which only the ratios are ever read.

    Raises:
        ModelError: they are no ratios that could be read again, or the file cannot be written.
    """
    kept = [round(ratio, 5) for ratio in ratios]
    _checked(path, kept)
    try:
        with replacing(path) as file:
            file.write(f"{json.dumps({'model': model, 'images': images, 'ratios': kept}, indent=2)}\n".encode())
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror}") from error


@cache
def published() -> tuple[float, ...]:
    """`FLUX_MAG_RATIOS` of the installed diffusers: FLUX.1-dev's over 28 steps, measured by MagCache's authors.

    Raises:
        ModelError: this diffusers has none.
    """
    spec = find_spec("diffusers")
    path = Path(*(spec.submodule_search_locations if spec and spec.submodule_search_locations else ()), *_SOURCE)
    for node in ast.parse(read_bytes(path, 2**20)).body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == _RATIOS for to in node.targets):
            return _checked(path, [each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)])
    raise ModelError(f"{path}: has no {_RATIOS}; fluxcli calibrate measures a model's own")


def _checked(path: Path, ratios: Sequence[Any]) -> tuple[float, ...]:
    for ratio in ratios:
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not _LOW <= ratio <= _HIGH:
            raise ModelError(f"{path}: a ratio must be a number from {_LOW} to {_HIGH}, not {shown(ratio)}")
    return tuple(map(float, ratios))
