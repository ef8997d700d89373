"""Files of a model directory, read as what they may be: written by a stranger. Regular files only, and never more of
one than its kind can need."""

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from fluxcli.core.errors import ModelError

MOST_JSON = 2**24  # bytes of a config or an index
MOST_VOCABULARY = 2**26  # bytes of a tokenizer's file: T5's is 2.4 MB
_LFS = b"version https://git-lfs"  # how a pointer to a file begins that git did not fetch
_SHOWN = 100  # characters of a name from a file, in a message


class MissingError(ModelError):
    """A file that the model needs is not there."""


def open_regular(path: Path) -> IO[bytes]:
    """Opens a file for reading, without waiting for the other end of a FIFO.

    Raises:
        MissingError: it is not there.
        ModelError: it is no regular file, cannot be read, or is a git-lfs pointer.
    """
    try:
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115 - the caller's to close
    except FileNotFoundError:
        gone = "a link to a file that is gone" if path.is_symlink() else "missing from the model"
        raise MissingError(f"{path}: {gone}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ModelError(f"{path}: is no regular file")
        start = file.read(len(_LFS))
        file.seek(0)
    except OSError as error:
        file.close()
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except ModelError:
        file.close()
        raise
    if start == _LFS:
        file.close()
        raise ModelError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in the model")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file of at most `most` bytes.

    Raises:
        ModelError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ModelError(f"{path}: has {size:,} bytes; fluxcli reads at most {most:,} of such a file")
        try:
            data = bytearray()
            while len(data) <= most and (part := file.read(most + 1 - len(data))):
                data += part
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > most:
        raise ModelError(f"{path}: is growing; fluxcli reads at most {most:,} bytes of such a file")
    return bytes(data)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's file.

    Raises:
        ModelError: naming the file, where it is missing, too large or not JSON.
    """
    return parse_json(read_bytes(path, MOST_JSON), path)


def parse_json(data: bytes, source: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except RecursionError:
        raise ModelError(f"{source}: cannot be read: nested too deeply") from None
    except ValueError as error:
        page = " (it looks like a web page; download it again)" if data.lstrip()[:1] == b"<" else ""
        raise ModelError(f"{source}: cannot be read: {error}{page}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{source}: must hold a JSON object")
    return value


def shown(value: Any) -> str:
    """A name or value from a file as a message shows it: short, on one line, no control characters."""
    text = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in str(value))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
