"""Inputs packed with gzip or zstd, known by their first bytes and unpacked as a stream."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fluxcli.core.errors import InputError, first_line
from fluxcli.job.input.raw.storage import blocks_of

SUFFIXES = (".gz", ".zst")
_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"


def kind_of(sample: bytes) -> str | None:
    """ "gzip" or "zstd" where a file begins as one."""
    return "gzip" if sample.startswith(_GZIP) else "zstd" if sample.startswith(_ZSTD) else None


def inner_name(path: str) -> Path:
    """A path without the ending that says how it is packed."""
    whole = Path(path)
    return whole.with_suffix("") if whole.suffix.lower() in SUFFIXES else whole


def unpacked(name: str, file: IO[bytes], kind: str) -> Iterator[bytes]:
    """What a file holds, all members or frames of it.

    Raises:
        InputError: it is cut short or damaged, zstd wants more than 128 MiB for its window, or nothing here reads zstd.
    """
    opened: Any
    opened, damage = _zstd(name) if kind == "zstd" else (gzip.open, (gzip.BadGzipFile, zlib.error))
    done = 0
    try:
        with opened(file) as archive:
            for block in blocks_of(archive):
                yield block
                done += len(block)
    except EOFError as error:
        raise InputError(f"{name}: is cut short: its {kind} data ends early; bring the whole file") from error
    except damage as error:
        at = f"after {done} bytes of text"
        raise InputError(f"{name}: is no sound {kind} file: {first_line(error)} ({at}); bring it anew") from error


def _zstd(name: str) -> tuple[Any, type[Exception]]:
    """How a file is opened, and what is raised where it is damaged: by Python's own module from 3.14 on, before that by
    what stands in for it."""
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise InputError(
                f"{name}: is zstd, which fluxcli[zstd] reads; install that, or unpack it: "
                "zstd -dc FILE | fluxcli batch - --input-format ..."
            ) from None
    return zstd.open, zstd.ZstdError
