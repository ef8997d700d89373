"""Kernels that optional libraries would compile one after the other, compiled ahead: in processes of their own, into
the same caches, while weights are read. A first start is that much shorter; nothing depends on it.

`python -m fluxcli.engine.ahead DEVICE DTYPE NAME…` is such a process. It ends when its standard input does, so that
none outlives the engine that began it.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fluxcli.engine.attention.backends import Attention
from fluxcli.engine.matmul.gemm import Gemm
from fluxcli.engine.matmul.quack import HOPPER, Quack
from fluxcli.engine.runtime.compile_cache import root, version
from fluxcli.engine.runtime.tuner import Tuner

_PROCESSES = 4
_FA4 = ("fa4", "fa4 128x144", "fa4 192x128")
_QUACK = ("bias", "gelu", "add", "pair", "parts")


class Ahead:
    """Compiles every kernel of the libraries that are installed, on a GPU that has more than one way of its own; once
    for each set of releases, which a file in the cache remembers."""

    def __init__(self, device: str, dtype: str) -> None:
        names: list[str] = []
        releases = {package: version(package) for package in ("torch", "flash-attn-4", "quack-kernels")}
        if device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] == HOPPER:
            names += _FA4 if releases["flash-attn-4"] else ()
            names += _QUACK if releases["quack-kernels"] else ()
        known = hashlib.sha256(f"{releases} {dtype} {names}".encode()).hexdigest()[:12]
        self._done = root() / "compile" / f"ahead-{known}"
        if self._done.exists():
            names = []
        shares = [names[first::_PROCESSES] for first in range(_PROCESSES)]
        self._running = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, device, dtype, *share],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for share in shares if share
        ]  # fmt: skip

    def wait(self) -> None:
        """Until all is compiled. What failed will fail again where it is needed, and be told there."""
        while self._running:
            process = self._running.pop()
            process.wait()
            if process.stdin:
                process.stdin.close()
            if not self._running:
                self._done.parent.mkdir(parents=True, exist_ok=True)
                self._done.touch()


def compile(names: Sequence[str], device: str, dtype: torch.dtype) -> None:
    """Runs each kernel once, on data as small as it may be."""
    for name in names:
        with contextlib.suppress(Exception):
            _kernel(name, device, dtype)()


def _kernel(name: str, device: str, dtype: torch.dtype) -> Callable[[], object]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    if name in _FA4:
        return Attention("fa4", Tuner(device), device, dtype).ways(drawn(2, 512, 3, 2, 128))[name]
    quack = Quack.here(device)
    assert quack is not None
    x, weight, bias = drawn(2, 512, 256), drawn(768, 256), drawn(768)
    (w1, w2), (b1, b2) = weight.split((256, 512)), bias.split((256, 512))
    gemms = {
        "bias": [Gemm(x, weight, bias)],
        "gelu": [Gemm(x, weight, bias, gelu=True)],
        "add": [Gemm(x, weight, None, out=drawn(2, 512, 768), add=True)],
        "pair": [Gemm(x, w1, b1), Gemm(x, w2, b2, gelu=True)],
        "parts": [Gemm(x, weight, bias, out=drawn(2, 1024, 768)[:, 512:])],  # of every sequence
    }[name]
    return partial(quack.run, quack.ways(gemms)[0], gemms)


def _leave_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    compile(sys.argv[3:], sys.argv[1], getattr(torch, sys.argv[2]))
    os._exit(0)  # the thread is waiting still
