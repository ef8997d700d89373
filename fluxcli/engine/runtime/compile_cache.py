"""Where compiled code is kept between processes: Inductor's and Triton's caches, and what was measured to be fastest,
under $FLUXCLI_CACHE, one folder per torch, CUDA, GPU and model architecture. It is code that runs here, so it is read
only where no other user can write."""

import fcntl
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import CacheError
from fluxcli.core.files import replacing
from fluxcli.core.ownership import make_private, open_to_others
from fluxcli.models.checkpoints import Checkpoint

_SETTLING = 64  # locks, which all choices share: more processes than that seldom settle something at once


class CompileCache:
    """Points the compilers at their folder. Make one before anything compiles.

    Attributes:
        environment: what compiled code depends on: versions, GPU, and the model's architecture with its dtype.

    Raises:
        CacheError: another user could have put code there.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self.environment = _environment(checkpoint, config)
        gpu, cuda = self.environment["gpu"], self.environment["cuda"]
        machine = f"cuda{cuda}-{gpu}" if gpu else "cpu"
        folder = re.sub(r"[^\w.+-]+", "_", f"torch{torch.__version__}-{machine}")
        self.directory = root() / "compile" / folder / self.environment["architecture"]
        if gpu or config.compile:
            self.check_private()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.directory / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(self.directory / "triton")
        if gpu:
            _listen_to_triton()

    def check_private(self) -> None:
        """Makes the cache's root where it is missing; raises CacheError where others can write into the cache."""
        places = (root(), self.directory / "inductor", self.directory / "triton", *_shared().values())
        advice = "set FLUXCLI_CACHE to a directory of your own"
        try:
            make_private(root())
            reason = next(filter(None, map(open_to_others, places)), None)
        except OSError as error:
            raise CacheError(f"the compile cache {root()} cannot be made: {error.strerror}; {advice}") from error
        if reason:
            raise CacheError(
                f"the compile cache {root()} holds code that runs here, and {reason}: chmod go-w, or {advice}"
            )

    def add(self, name: str, choices: dict[str, Any]) -> None:
        """Measured choices, into the file `name` of the folder; they replace those of the same keys."""
        self.check_private()
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._alone("writing"), replacing(self.directory / name) as file:
            file.write(json.dumps({**self.read(name), **choices}, indent=1).encode())

    def settled(self, name: str, key: str, taken: Callable[[object], bool], find: Callable[[], str]) -> str:
        """A choice of the file `name`: what another process put there, where that can be `taken`, else what is found
        now. Of several processes that want one, one finds it and the others wait for that."""
        self.check_private()
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._alone(f"settling-{zlib.crc32(key.encode()) % _SETTLING}"):
            known = self.read(name).get(key)
            if isinstance(known, str) and taken(known):
                return known
            found = find()
            self.add(name, {key: found})
            return found

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Keeps other processes out of the same. On a disk without locks none is kept out, which costs a choice: it is
        found again."""
        make_private(locks := root() / "locks")
        descriptor = os.open(locks / what, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def read(self, name: str) -> dict[str, Any]:
        """The choices in a file of the folder; none where it is not there."""
        self.check_private()
        try:
            return dict(json.loads((self.directory / name).read_text()))
        except (OSError, ValueError, TypeError):
            return {}


def root() -> Path:
    """$FLUXCLI_CACHE, else `fluxcli` in the XDG cache directory."""
    if own := os.environ.get("FLUXCLI_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluxcli"


def share_cute_caches() -> None:
    """FlashAttention-4 and quack-kernels compile for each kind of shape, and read these when they are imported."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    for variable, directory in _shared().items():
        os.environ.setdefault(variable, str(directory))


def _shared() -> dict[str, Path]:
    return {"FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": root() / "flash-attn-4", "QUACK_CACHE_DIR": root() / "quack"}


def compile_counts() -> Counter[str]:
    """What this process compiled so far: `graphs` traced by Dynamo and kernels made ready by Triton, and of those
    `misses` that no cache held."""
    from torch._dynamo.utils import counters

    traced = Counter(
        graphs=counters["stats"]["unique_graphs"],
        misses=counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"],
    )
    return traced + _kernels


_kernels: Counter[str] = Counter()


def _listen_to_triton() -> None:
    from triton import knobs

    knobs.compilation.listener = _count_kernel


def _count_kernel(*, cache_hit: bool, **about: Any) -> None:
    _kernels.update(graphs=1, misses=0 if cache_hit else 1)


def _environment(checkpoint: Checkpoint, config: EngineConfig) -> dict[str, Any]:
    cuda = config.device.startswith("cuda")
    shape = {key: value for key, value in checkpoint.transformer.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([shape, config.dtype], sort_keys=True).encode()).hexdigest()
    return {
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda if cuda else None,
        "gpu": torch.cuda.get_device_name(config.device) if cuda else None,
        "capability": list(torch.cuda.get_device_capability(config.device)) if cuda else None,
        "architecture": f"flux-{digest[:12]}",
        "dtype": config.dtype,
    }


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
