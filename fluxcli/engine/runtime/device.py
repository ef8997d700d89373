"""What "auto" means on this machine: device, dtype, and whether to compile."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from fluxcli.core import config
from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import DeviceError, Remark

TORCH = ((2, 11), (2, 14))  # the first and the last release that the tests were run with
_FP8 = (8, 9)  # the first compute capability that multiplies 8-bit floats

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in config.DTYPES}


def has_gpu() -> bool:
    return torch.cuda.is_available()


def gpu_count() -> int:
    return torch.cuda.device_count()


def alone(gpu: int) -> dict[str, str]:
    """The environment of a process that sees one GPU, this process's number `gpu`, and calls it cuda:0."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": str(gpu) if visible is None else visible.split(",")[gpu].strip()}


def resolve(
    device: str, dtype: str, compile: bool | None, backend: str, quantization: str = "none", elsewhere: bool = False
) -> EngineConfig:
    """Settles --device, --dtype and --compile; "auto" and None mean what suits the machine.

    Args:
        elsewhere: "cuda" is a GPU of another machine, where `check` is to be called.

    Raises:
        DeviceError: a GPU that is not there, or one that cannot do what is asked.
    """
    _check_torch()
    if device == "auto":
        device = "cuda" if has_gpu() else "cpu"
    if device.startswith("cuda") and not elsewhere:
        device = _gpu(device)
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if compile is None:
        compile = device.startswith("cuda")
    settled = EngineConfig(device, dtype, compile, backend, quantization)
    if not elsewhere:
        check(settled)
    return settled


def check(engine: EngineConfig) -> None:
    """Raises DeviceError for what this machine's device cannot do."""
    if engine.device.startswith("cuda"):
        _gpu(engine.device)
        if engine.fp8:
            _check_fp8(engine.device, engine.dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """On a CPU, torch adds up in one order while the block runs, whatever the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def machine(engine: EngineConfig) -> dict[str, Any]:
    """Device, dtype, quantization and versions for the records of a run."""
    here = ":" in engine.device  # else a GPU of some other machine, or none
    return {
        "device": torch.cuda.get_device_name(engine.device) if here else engine.device,
        "dtype": engine.dtype,
        **({"quantization": engine.quantization} if engine.fp8 else {}),
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{package: metadata.version(package) for package in ("diffusers", "transformers")},
        },
    }


def _check_torch() -> None:
    """What pip would not install beside fluxcli may be here all the same: by --no-deps, or a package of the system."""
    first, last = TORCH
    release = tuple(map(int, re.findall("[0-9]+", torch.__version__)[:2]))
    if not first <= release <= last:
        tested = " to ".join(".".join(map(str, each)) for each in TORCH)
        warnings.warn(
            f"fluxcli is for torch {tested}, and {torch.__version__} is installed: what fails may fail for that",
            Remark,
            stacklevel=1,
        )


def _check_fp8(device: str, dtype: str) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8:
        raise DeviceError(
            f"--quantization fp8: {torch.cuda.get_device_name(device)} has no matmuls of 8-bit floats; Ada, Hopper and "
            "Blackwell GPUs do. Use --quantization none"
        )
    if dtype != "bfloat16":
        raise DeviceError(f"--quantization fp8: on a GPU it goes with --dtype bfloat16, not {dtype}")


def _gpu(device: str) -> str:
    if not has_gpu():
        raise DeviceError(f"--device {device}: torch {torch.__version__} sees no CUDA GPU; use --device cpu")
    index = int(device.partition(":")[2] or torch.cuda.current_device())
    if index >= torch.cuda.device_count():
        raise DeviceError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return f"cuda:{index}"
