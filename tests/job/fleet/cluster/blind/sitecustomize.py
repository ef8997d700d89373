"""Python on the nodes of the tests' cluster. Nothing below a directory named `unseen` is there, as on another machine;
nor is fluxcli, while the file $BARE is there. Those with a $HOST say that they are on it."""

import errno
import os
import socket
import sys
from typing import Any

_open = os.open


def _blind(path: Any, *args: Any, **more: Any) -> int:
    if isinstance(path, str | os.PathLike) and "/unseen/" in f"{os.fspath(path)}/":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    return _open(path, *args, **more)


class _Bare:
    @staticmethod
    def find_spec(name: str, *where: Any) -> None:
        if name.partition(".")[0] == "fluxcli" and os.path.exists(os.environ["BARE"]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if "HOST" in os.environ:
    socket.gethostname = lambda: os.environ["HOST"]
os.open = _blind
sys.meta_path.insert(0, _Bare)  # type: ignore[arg-type]
