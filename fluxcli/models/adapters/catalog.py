"""The adapters of one model: each file looked at once, whichever rows and options name it."""

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError
from fluxcli.core.records import Adapter
from fluxcli.models.adapters.alpha import beside
from fluxcli.models.adapters.changes import Change, changes
from fluxcli.models.files import open_regular
from fluxcli.models.flux1 import targets
from fluxcli.models.flux1.targets import Targets

_MOST = 2**34  # bytes; the largest have some 5 GB
_PART = 2**22  # of those, hashed at once


class Catalog:
    """Adapter files held against one checkpoint.

    Args:
        config: a part's, by its name.
    """

    def __init__(self, config: Callable[[str], Mapping[str, Any]]) -> None:
        self._config = config
        self._targets: Mapping[str, Targets] | None = None
        self._known: dict[str, tuple[str, bool]] = {}  # hash, or what is wrong, by path
        self._seen: dict[str, tuple[int, ...] | None] = {}  # what the files were when they were looked at

    def adapter(self, path: str, scale: float = 1.0) -> Adapter:
        """A file with its hash.

        Raises:
            ModelError: naming the file, and what keeps it from being an adapter of this model.
        """
        if path not in self._known:
            self._seen[path] = _signature(path)
            try:
                file = place(path)
                self.changes(file)
                self._known[path] = digest(file), True
            except ModelError as error:
                self._known[path] = str(error), False
        known, good = self._known[path]
        if not good:
            raise ModelError(known)
        return Adapter(path, known, scale)

    def refresh(self) -> None:
        """Forgets files that are others by now."""
        for path in [path for path, seen in self._seen.items() if seen != _signature(path)]:
            del self._known[path], self._seen[path]

    def changes(self, path: Path) -> list[Change]:
        """What a file changes of the model.

        Raises:
            ModelError: as `adapter`.
        """
        try:
            about = path.stat()
        except (OSError, ValueError) as error:
            gone = "no such file" if isinstance(error, FileNotFoundError) else "cannot be read"
            raise ModelError(f"{path}: {gone}; an adapter is a .safetensors file on this machine") from None
        if stat.S_ISDIR(about.st_mode):
            raise ModelError(f"{path}: is a directory; name the .safetensors file in it")
        if about.st_size > _MOST:
            raise ModelError(f"{path}: has {about.st_size:,} bytes; fluxcli reads adapters of at most {_MOST:,}")
        if self._targets is None:
            makers = {"transformer": targets.transformer, "text_encoder": targets.clip, "text_encoder_2": targets.t5}
            self._targets = {part: make(self._config(part)) for part, make in makers.items()}
        return changes(path, self._targets)


def place(path: str) -> Path:
    """Where an adapter's path leads."""
    return Path(os.path.expanduser(path))


def _signature(path: str) -> tuple[int, ...] | None:
    """What is another number when a file is another, and of PEFT's config too; None for one that is not there."""
    try:
        file = place(path)
        about = [each.stat() for each in (file, beside(file)) if each is not None]
    except (OSError, ValueError):
        return None
    return tuple(number for each in about for number in (each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns))


def digest(path: Path) -> str:
    """SHA-256 of an adapter's bytes, and of PEFT's config behind them where it has one.

    Raises:
        ModelError: it cannot be read.
    """
    taken = hashlib.sha256()
    for each in (path, beside(path)):
        if each is not None:
            with open_regular(each) as file:
                try:
                    while part := file.read(_PART):
                        taken.update(part)
                except OSError as error:
                    raise ModelError(f"{each}: cannot be read: {error.strerror}") from error
    return taken.hexdigest()
