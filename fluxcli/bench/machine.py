"""What a figure depends on beside the code: versions, the driver, and how fast and hot the GPU is."""

import platform
import subprocess
from typing import Any

import torch

from fluxcli import __version__
from fluxcli.core.config import EngineConfig
from fluxcli.engine.runtime import device

_FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "power.limit": "watts_limit",
}


def machine(config: EngineConfig) -> dict[str, Any]:
    """Device, dtype and versions; `driver` is null where nvidia-smi cannot tell."""
    known = device.machine(config)
    own = {"fluxcli": __version__, "python": platform.python_version()}
    driver = _nvidia_smi(config.device, ["driver_version"])
    versions = {**own, **known["versions"], "driver": driver[0] if isinstance(driver, list) else None}
    return {**known, "versions": versions, "compile": config.compile}


def clocks(config: EngineConfig) -> dict[str, Any]:
    """Clocks, temperature and power of the GPU now; `unavailable` with the reason where they cannot be read."""
    values = _nvidia_smi(config.device, list(_FIELDS))
    if isinstance(values, str):
        return {"unavailable": values}
    return {name: _number(value) for name, value in zip(_FIELDS.values(), values, strict=True)}


def _nvidia_smi(device: str, fields: list[str]) -> list[str] | str:
    """The fields' values, or why there are none."""
    if not device.startswith("cuda"):
        return "no GPU is in use"
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # torch and nvidia-smi may count GPUs differently
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip()}"
    return [value.strip() for value in done.stdout.strip().split(",")]


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None  # "[N/A]": this GPU does not tell
