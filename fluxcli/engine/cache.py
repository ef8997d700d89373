"""Where compiled code is kept between processes: Inductor's and Triton's caches, and the measured attention choices,
under $FLUXCLI_CACHE, one folder per torch, CUDA, GPU and model architecture."""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

import torch

from fluxcli.checkpoints import Checkpoint
from fluxcli.config import EngineConfig


class CompileCache:
    """Points the compilers at their folder. Make one before anything compiles."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self.directory = root() / "compile" / _environment(config.device) / _architecture(checkpoint, config.dtype)
        self._attention = self.directory / "attention.json"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.directory / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(self.directory / "triton")

    def attention(self, shape: str) -> str | None:
        """The backend an earlier process measured to be fastest at `shape`; asked for again, so that its compiled code
        is found again too."""
        try:
            return json.loads(self._attention.read_text()).get(shape)
        except (OSError, ValueError):
            return None

    def remember_attention(self, shape: str, backend: str) -> None:
        try:
            known = json.loads(self._attention.read_text())
        except (OSError, ValueError):
            known = {}
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self._attention.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({**known, shape: backend}, indent=1))
        temporary.replace(self._attention)


def root() -> Path:
    """$FLUXCLI_CACHE, else `fluxcli` in the XDG cache directory."""
    if own := os.environ.get("FLUXCLI_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluxcli"


def compile_counts() -> Counter[str]:
    """What this process compiled so far: `graphs` traced by Dynamo, and of those `misses` that no cache held."""
    from torch._dynamo.utils import counters

    return Counter(
        graphs=counters["stats"]["unique_graphs"],
        misses=counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"],
    )


def _environment(device: str) -> str:
    machine = "cpu"
    if device.startswith("cuda"):
        machine = f"cuda{torch.version.cuda}-{torch.cuda.get_device_name(device)}"
    return re.sub(r"[^\w.+-]+", "_", f"torch{torch.__version__}-{machine}")


def _architecture(checkpoint: Checkpoint, dtype: str) -> str:
    shape = {key: value for key, value in checkpoint.transformer.items() if not key.startswith("_")}
    return f"flux-{hashlib.sha256(json.dumps([shape, dtype], sort_keys=True).encode()).hexdigest()[:12]}"
