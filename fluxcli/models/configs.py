"""The configs of a pipeline's parts: read, cleaned of what is not about the architecture, and held to what a machine
can build, before anything is built from them."""

import math
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError
from fluxcli.core.family import Family
from fluxcli.models.files import read_json, shown

_MOST_LAYERS = 1000
_MOST = 2**24  # any other whole number
_MOST_ITEMS = 64  # in a list
_ROPE_THETA = 10_000  # fixed in FLUX.1; some configs carry it
_DTYPES = ("dtype", "torch_dtype")  # how the weights were stored, which the files say themselves
_ENDS = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# Its settings and their defaults: flags, numbers, and (by null) numbers that may be left out.
_SCHEDULER: dict[str, bool | float | str | None] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}


def read_config(directory: Path, config: str = "config.json") -> dict[str, Any]:
    """A part's config, with numbers that something can be built of. Keys that begin with `_` are dropped: they say how
    a library is to run, some of them with whose code.

    Raises:
        ModelError: the file is not what it should be, or its weights are quantised.
    """
    path = directory / config
    given = read_json(path)
    if method := _quantised(directory, given):
        raise ModelError(f"{path}: the weights are quantised ({method}); fluxcli needs the original ones")
    if "vocab_size" not in given and isinstance(given.get("text_config"), dict):
        given = given["text_config"]  # of a whole CLIP model: its text half
    check_numbers(path, given)
    return {key: value for key, value in given.items() if not key.startswith("_")}


def transformer_config(directory: Path, family: Family, sizes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """transformer/config.json with the family's defaults for what it leaves out.

    Args:
        sizes: what the file of its weights says in place of that.

    Raises:
        ModelError: naming a key that the family does not know or a value of the wrong kind.
    """
    path = directory / "config.json"
    given = {key: value for key, value in read_config(directory).items() if key not in _DTYPES}
    for key in ("theta", "rope_theta"):
        if given.pop(key, _ROPE_THETA) != _ROPE_THETA:
            raise ModelError(f"{path}: {key} must be {_ROPE_THETA}: {family.name} has no other")
    if unknown := sorted(given.keys() - family.transformer.keys()):
        raise ModelError(f"{path}: fluxcli does not know {', '.join(map(shown, unknown))}")
    for key, default in family.transformer.items():
        value = given.setdefault(key, default)
        if not _alike(value, default):
            kind = "a list of whole numbers" if isinstance(default, tuple) else f"like {default}"
            raise ModelError(f"{path}: {key} must be {kind}, got {shown(value)}")
    given |= sizes or {}
    _check_transformer(given, path)
    return given


def _check_transformer(config: Mapping[str, Any], source: Path) -> None:
    """Raises ModelError, naming `source`, for a transformer that is no FLUX.1 from text to image."""
    axes, head = config["axes_dims_rope"], config["attention_head_dim"]
    if sum(axes) != head:
        raise ModelError(f"{source}: axes_dims_rope {list(axes)} must add up to attention_head_dim {head}")
    channels, out = config["in_channels"], config["out_channels"]
    if config["patch_size"] != 1:
        raise ModelError(f"{source}: patch_size must be 1, got {config['patch_size']}")
    if out not in (None, channels):
        raise ModelError(
            f"{source}: takes {channels} channels and makes {out}: FLUX.1 Fill, a control model or their like, which "
            "draw from an image"
        )


def scheduler_config(directory: Path) -> dict[str, Any]:
    """scheduler/scheduler_config.json, every setting filled in; keys that the scheduler does not know are left out.

    Raises:
        ModelError: another scheduler, or a setting that no schedule can be made with.
    """
    path = directory / "scheduler_config.json"
    given = read_json(path)
    name = given.get("_class_name", SCHEDULER)
    if name != SCHEDULER:
        raise ModelError(f"{path}: fluxcli samples with {SCHEDULER}, this is {shown(name)}")
    settings = {key: given.get(key, default) for key, default in _SCHEDULER.items()}
    for key, default in _SCHEDULER.items():
        if isinstance(default, bool | str):
            if settings[key] is None:
                settings[key] = default
            if type(settings[key]) is not type(default):
                raise ModelError(f"{path}: {key} must be like {default}, got {shown(settings[key])}")
        elif not _number(settings[key]):
            # Without dynamic shifting its two ends are not used.
            optional = default is None or (key in _ENDS and not settings["use_dynamic_shifting"])
            if settings[key] is not None or not optional:
                raise ModelError(f"{path}: {key} must be a number, got {shown(settings[key])}")
    if fault := _unusable(settings):
        raise ModelError(f"{path}: {fault}")
    return settings


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _unusable(settings: dict[str, Any]) -> str | None:
    """Why no schedule can be made with these, or not by fluxcli."""
    steps, base, kind = (settings[key] for key in ("num_train_timesteps", "base_image_seq_len", "time_shift_type"))
    if type(steps) is not int or not 1 <= steps <= _MOST:
        return f"num_train_timesteps must be 1 to {_MOST}, got {steps}"
    if settings["shift"] <= 0:
        return f"shift must be above 0, got {settings['shift']}"
    if settings["use_dynamic_shifting"] and settings["max_image_seq_len"] == base:
        return f"max_image_seq_len must differ from base_image_seq_len, both are {base}"
    if kind not in ("exponential", "linear"):
        return f"time_shift_type must be exponential or linear, got {shown(kind)}"
    if settings["stochastic_sampling"]:
        return "stochastic_sampling adds noise at each step, which fluxcli does not do"
    if settings["use_beta_sigmas"] and find_spec("scipy") is None:
        return "use_beta_sigmas needs scipy: pip install scipy"
    if sum(settings[f"use_{kind}_sigmas"] for kind in ("karras", "exponential", "beta")) > 1:
        return "only one kind of sigmas can be used: karras, exponential or beta"
    return None


def _alike(value: Any, default: object) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and all(type(each) is int and each > 0 for each in value)
    if default is None:
        return value is None or type(value) is int
    return type(value) is int and value >= 0


def check_numbers(path: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelError, naming `path`, for a number that nothing can be built of."""
    for key, value in config.items():
        _check_number(path, key, value)


def _check_number(path: Path, key: str, value: Any) -> None:
    items = value if isinstance(value, list) else [value]
    if len(items) > _MOST_ITEMS:
        raise ModelError(f"{path}: {shown(key)} has {len(items)} items; fluxcli builds at most {_MOST_ITEMS}")
    most = _MOST_LAYERS if re.search("layers|blocks", key) else _MOST
    for item in items:
        if type(item) is int and abs(item) > most:
            raise ModelError(f"{path}: {shown(key)} is {item}; fluxcli builds at most {most}")
        if type(item) is int and item < 0 and most == _MOST_LAYERS:
            raise ModelError(f"{path}: {shown(key)} is {item}")


def _quantised(directory: Path, config: dict[str, Any]) -> str | None:
    """How a part's weights are quantised, by its config or by what lies beside it."""
    about = config.get("quantization_config") or config.get("quantization") or config.get("compression_config")
    if isinstance(about, dict):
        kind = about.get("bnb_4bit_quant_type") if about.get("load_in_4bit") else about.get("quant_type")
        eight_bit = "int8" if about.get("load_in_8bit") else None
        method = [about.get("quant_method") or "of an unnamed kind", kind or eight_bit]
        return shown(" ".join(str(each) for each in method if each))
    if about:
        return shown(about)
    return "optimum-quanto" if (directory / "quantization_map.json").exists() else None
