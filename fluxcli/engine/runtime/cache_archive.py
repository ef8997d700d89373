"""A compile cache as one file, for another machine of the same kind: torch's portable artifacts, the files of the cache
that these leave out, and a header that says where they come from."""

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fluxcli import __version__
from fluxcli.core.errors import CacheError
from fluxcli.engine.runtime.compile_cache import CompileCache, root

_FORMAT = "fluxcli compile cache 1"
_HEADER, _ARTIFACTS, _FILES = "header.json", "torch.bin", "files/"
# Beside torch's artifacts: measured choices, Triton's cache (our own kernels), libraries compiled for a CPU; and, for
# all architectures together, those of FlashAttention-4 and quack-kernels.
_LEFT_OUT = ("*.json", "triton/*/*", "inductor/**/*.so")
_SHARED = ("flash-attn-4/**/*", "quack/**/*")
_GROUP = "__grp__"  # begins the names of Triton's files that list others, by absolute path


def check_export(file: Path) -> None:
    """Raises CacheError for what could not be written in the end, told before any work."""
    if file.exists():
        raise CacheError(f"--export {file}: exists already; fluxcli overwrites nothing")
    if not os.access(file.parent, os.W_OK):
        raise CacheError(f"--export {file}: {file.parent} is not a directory that can be written")


def export(cache: CompileCache, file: Path) -> int:
    """Writes what this process compiled, or found in the cache, to `file`, whole or not at all. Returns its bytes.

    Raises:
        CacheError: there is nothing to write, or no way to write it.
    """
    artifacts = torch.compiler.save_cache_artifacts()
    paths = sorted(path for path in _left_out(cache) if path.is_file())
    if artifacts is None and not paths:
        raise CacheError(f"--export {file}: nothing was compiled, so there is nothing to carry; --compile?")
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr(_HEADER, json.dumps(_header(cache), indent=1))
            archive.writestr(_ARTIFACTS, artifacts[0] if artifacts else b"")
            for path in paths:
                data = _listing(path, path.read_bytes(), lambda listed: os.path.relpath(listed, root()))
                archive.writestr(_FILES + path.relative_to(root()).as_posix(), data)
        check_export(file)
        temporary.replace(file)
    except OSError as error:
        raise CacheError(f"--export {file}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return file.stat().st_size


def import_(cache: CompileCache, file: Path) -> int:
    """Fills the cache from `file`, all of which is checked first. Returns the number of entries.

    Raises:
        CacheError: not such a file, damaged, or made where torch, CUDA, the GPU or the model differ.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}  # checks their sums
        header, artifacts = json.loads(contents.pop(_HEADER)), contents.pop(_ARTIFACTS)
    except OSError as error:
        raise CacheError(f"--import {file}: cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError) as error:
        raise CacheError(f"--import {file}: damaged, or not a file that warmup --export wrote: {error}") from error
    here = _header(cache)
    if differing := [name for name in here if header.get(name) != here[name]]:
        reasons = ", ".join(f"{name} {header.get(name)} there and {here[name]} here" for name in differing)
        raise CacheError(f"--import {file}: made for something else: {reasons}")
    targets = {name: _target(file, name) for name in contents}
    logging.getLogger("torch.compiler._cache").setLevel(logging.CRITICAL)  # it would show a traceback; we say it below
    loaded = torch.compiler.load_cache_artifacts(artifacts) if artifacts else None
    if artifacts and loaded is None:
        raise CacheError(f"--import {file}: torch cannot read its artifacts; export it again")
    try:
        for name, target in targets.items():
            if target.parent == cache.directory:
                cache.add(target.name, json.loads(contents[name]))
            else:
                data = _listing(target, contents[name], lambda listed: str(root() / listed))
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f"{target.name}.{os.getpid()}")
                temporary.write_bytes(data)
                temporary.replace(target)
    except OSError as error:
        raise CacheError(f"--import {file}: {error.filename} cannot be written: {error.strerror}") from error
    return len(targets) + (sum(map(len, loaded.artifacts.values())) if loaded else 0)


def _header(cache: CompileCache) -> dict[str, Any]:
    return {"format": _FORMAT, "fluxcli": __version__, **cache.environment}


def _left_out(cache: CompileCache) -> set[Path]:
    own = {path for pattern in _LEFT_OUT for path in cache.directory.glob(pattern)}
    return own | {path for pattern in _SHARED for path in root().glob(pattern)}


def _target(file: Path, name: str) -> Path:
    """Equal headers mean equal folders below the root."""
    inner = PurePosixPath(name.removeprefix(_FILES))
    if not name.startswith(_FILES) or inner.is_absolute() or ".." in inner.parts:
        raise CacheError(f"--import {file}: {name} in it has no place in a cache")
    return root() / inner


def _listing(path: Path, data: bytes, moved: Callable[[str], str]) -> bytes:
    """A file as it is, unless it lists the paths of others: each of those is `moved`."""
    if not path.name.startswith(_GROUP):
        return data
    listed = json.loads(data)
    listed["child_paths"] = {child: moved(other) for child, other in listed["child_paths"].items()}
    return json.dumps(listed).encode()
