"""A compile cache as one file, for another machine of the same kind.

Two kinds of things are in it. Measured choices are data: JSON, held to its form. All the rest is code that will run
where it arrives, on the GPU or in the process itself: torch's portable artifacts, which it unpickles, Triton's kernels
and launchers, libraries compiled for a CPU, objects of FlashAttention-4 and quack-kernels. Code is carried signed with
a key of the user's, and taken in only with the same key.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fluxcli import __version__
from fluxcli.core.errors import CacheError
from fluxcli.core.files import replacing
from fluxcli.engine.runtime import sealed
from fluxcli.engine.runtime.compile_cache import CompileCache, root
from fluxcli.engine.runtime.sealed import Damaged, Sealed

_FORMAT = "fluxcli compile cache 2"
_CHOICES, _ARTIFACTS, _FILES = "choices/", "torch.bin", "files/"
_KINDS = {".so", ".o", ".cubin", ".ptx", ".ttir", ".ttgir", ".llir", ".source", ".json"}  # locks, for one, stay behind
_OWN = ("triton/*/*", "inductor/**/*.so")  # of an architecture, beside torch's artifacts
_SHARED = ("flash-attn-4/**/*", "quack/**/*")  # packages that keep what they compile for all architectures together
_PART = re.compile(r"[A-Za-z0-9_][\w.+=-]{0,199}", re.ASCII)  # of a path; none begins with a dot
_CHOICE = re.compile(r"[a-z][a-z_-]{0,39}\.json", re.ASCII)
_MOST_CHOICES, _MOST_CHOICES_BYTES = 16, 2**20  # files, and bytes of each
_LONGEST_KEY, _LONGEST_NAME = 1024, 64
_GROUP = "__grp__"  # begins the names of Triton's files that list others, by absolute path


class _Refused(Exception):
    """Why an archive that is whole is not taken in."""


def check_export(file: Path) -> None:
    """Raises CacheError for what could not be written in the end, told before any work."""
    if file.exists():
        raise CacheError(f"--export {file}: exists already; fluxcli overwrites nothing")
    if not os.access(file.parent, os.W_OK):
        raise CacheError(f"--export {file}: {file.parent} is not a directory that can be written")


def export(cache: CompileCache, file: Path, key: bytes | None) -> int:
    """Writes what this process compiled, or found in the cache, to `file`, whole or not at all. Returns its bytes.

    Args:
        key: signs it; without one it carries the measured choices alone.

    Raises:
        CacheError: there is nothing to write, or no way to write it.
    """
    members = _choices_of(cache)
    try:
        with replacing(file) as opened:
            written = sealed.write(opened, _about(cache), chain(members, _code_of(cache) if key else ()), key)
            if not written:
                reason = "was compiled; --compile?" if key else "was measured, and compiled code needs --key FILE"
                raise Damaged(f"there is nothing to carry: nothing {reason}")
            check_export(file)
    except Damaged as error:
        raise CacheError(f"--export {file}: {error}") from error
    except OSError as error:
        raise CacheError(f"--export {file}: cannot be written: {error.strerror}") from error
    return file.stat().st_size


def import_(cache: CompileCache, file: Path, key: bytes | None) -> int:
    """Fills the cache from `file`, all of which is checked before anything of it is used. Returns the entries.

    Raises:
        CacheError: not such a file, damaged, made where torch, CUDA, the GPU or the model differ, or with compiled
            code in it that `key` has not signed.
    """
    try:
        with sealed.opened(file) as archive:
            _check_origin(cache, archive)
            for name in archive.sizes:
                _check_name(cache, name)
            _check_signature(archive, key)
            choices = _choices(archive)
            for name in archive.sizes:
                archive.read(name)
            return _let_in(cache, archive, choices)
    except _Refused as error:
        raise CacheError(f"--import {file}: {error}") from error
    except Damaged as error:
        what = "damaged, or not a file that warmup --export wrote"
        raise CacheError(f"--import {file}: {what}: {error}") from error
    except OSError as error:
        what = "cannot be read" if error.filename in (None, str(file)) else f"{error.filename} cannot be written"
        raise CacheError(f"--import {file}: {what}: {error.strerror}") from error


def _let_in(cache: CompileCache, archive: Sealed, choices: dict[str, dict[str, Any]]) -> int:
    """What is read here a second time is held to the same listing again."""
    cache.check_private()
    entries = len(archive.sizes) - (_ARTIFACTS in archive.sizes)
    if _ARTIFACTS in archive.sizes:
        _make_plain_directory(cache.directory / "inductor")
        entries += _load_artifacts(archive.read(_ARTIFACTS))
    for name in archive.sizes:
        if name.startswith(_FILES):
            target = root() / name.removeprefix(_FILES)
            _replace(target, _listing(target, archive.read(name), _arrived))
    for name, known in choices.items():
        cache.add(name.removeprefix(_CHOICES), known)
    return entries


def _check_origin(cache: CompileCache, archive: Sealed) -> None:
    here, there = _about(cache), archive.about
    if differing := [name for name in here if there.get(name) != here[name]]:
        reasons = ", ".join(f"{name} {_shown(there.get(name))} there and {here[name]} here" for name in differing)
        raise _Refused(f"made for something else: {reasons}")


def _check_signature(archive: Sealed, key: bytes | None) -> None:
    if key is not None and not archive.signed:
        raise _Refused("it is not signed, so nobody knows who wrote it; export it again with --key")
    if key is not None and not archive.signed_with(key):
        raise _Refused("its signature is not this key's: signed with another, or changed since")
    if key is None and any(not name.startswith(_CHOICES) for name in archive.sizes):
        what = "it holds compiled code, which will run here"
        if archive.signed:
            raise _Refused(f"{what}; give --key FILE, the key that it was exported with")
        raise _Refused(f"{what}, and is not signed; export it again with --key FILE, and give that key here")


def _check_name(cache: CompileCache, name: str) -> None:
    """Equal headers mean equal folders below the root."""
    if name == _ARTIFACTS or (name.startswith(_CHOICES) and _CHOICE.fullmatch(name.removeprefix(_CHOICES))):
        return
    parts = tuple(name.split("/"))
    own = (_FILES[:-1], *cache.directory.relative_to(root()).parts)
    homes = ((*own, "triton"), (*own, "inductor"), (_FILES[:-1], "flash-attn-4"), (_FILES[:-1], "quack"))
    known = any(parts[: len(home)] == home and len(parts) > len(home) for home in homes)
    if not known or not all(map(_PART.fullmatch, parts)) or Path(name).suffix not in _KINDS:
        raise _Refused(f"{_shown(name)} in it has no place in a cache")


def _choices(archive: Sealed) -> dict[str, dict[str, Any]]:
    """Measured choices by file, in their form: names -> names, numbers, or small tables of these."""
    names = [name for name in archive.sizes if name.startswith(_CHOICES)]
    if len(names) > _MOST_CHOICES or any(archive.sizes[name] > _MOST_CHOICES_BYTES for name in names):
        raise _Refused("there are more choices in it than can have been measured")
    found = {}
    for name in names:
        data = archive.read(name)
        try:
            known = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _Refused(f"{name} in it is not JSON: {error}") from error
        if not isinstance(known, dict) or not _well_formed(known, deep=3):
            raise _Refused(f"{name} in it is not a table of choices")
        found[name] = known
    return found


def _well_formed(value: object, deep: int) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_NAME and value.isprintable()
    if isinstance(value, dict) and deep:
        return all(
            len(key) <= _LONGEST_KEY and key.isprintable() and _well_formed(each, deep - 1)
            for key, each in value.items()
        )
    if isinstance(value, list) and deep:
        return all(_well_formed(each, deep - 1) for each in value)
    return value is None or (isinstance(value, bool | int | float) and abs(value) < 2**63)


def _load_artifacts(artifacts: bytes) -> int:
    """Torch's, into the caches of its compilers. Their keys are parts of the paths that torch writes."""
    from torch.compiler._cache import CacheArtifactManager

    logging.getLogger("torch.compiler._cache").setLevel(logging.CRITICAL)  # it would show a traceback; we say it below
    read = CacheArtifactManager.deserialize(artifacts)
    if read is None:
        raise _Refused("torch cannot read its artifacts; export it again")
    keys = [artifact.key for kind in read.values() for artifact in kind]
    for key in keys:
        if not all(map(_PART.fullmatch, key.split("/"))):
            raise _Refused(f"torch's entry {_shown(key)} in it has no place in a cache")
    CacheArtifactManager.populate_caches(read)
    return len(keys)


def _choices_of(cache: CompileCache) -> Iterator[tuple[str, bytes]]:
    """Those that `_choices` would let in again."""
    for path in sorted(cache.directory.glob("*.json")):
        found = cache.read(path.name)
        known = {key: value for key, value in found.items() if _well_formed({key: value}, deep=3)}
        if known and _CHOICE.fullmatch(path.name):
            yield _CHOICES + path.name, json.dumps(known, indent=1).encode()


def _code_of(cache: CompileCache) -> Iterator[tuple[str, bytes]]:
    if artifacts := torch.compiler.save_cache_artifacts():
        yield _ARTIFACTS, artifacts[0]
    own = {path for pattern in _OWN for path in cache.directory.glob(pattern)}
    shared = {path for pattern in _SHARED for path in root().glob(pattern)}
    for path in sorted(own | shared):
        parts = path.relative_to(root()).parts
        if path.suffix in _KINDS and path.is_file() and not path.is_symlink() and all(map(_PART.fullmatch, parts)):
            data = _listing(path, path.read_bytes(), lambda listed: os.path.relpath(listed, root()))
            yield _FILES + "/".join(parts), data


def _listing(path: Path, data: bytes, moved: Callable[[str], str]) -> bytes:
    """A file as it is, unless it lists the paths of others: each of those is `moved`."""
    if not path.name.startswith(_GROUP):
        return data
    listed = json.loads(data)
    listed["child_paths"] = {child: moved(other) for child, other in listed["child_paths"].items()}
    return json.dumps(listed).encode()


def _arrived(listed: str) -> str:
    if not all(map(_PART.fullmatch, listed.split("/"))):
        raise _Refused(f"{_shown(listed)}, which a list in it names, has no place in a cache")
    return str(root() / listed)


def _replace(target: Path, data: bytes) -> None:
    """Puts a file into the cache, whole or not at all, and follows no link below its root on the way."""
    _make_plain_directory(target.parent)
    with replacing(target) as file:
        file.write(data)


def _make_plain_directory(directory: Path) -> None:
    for place in (*reversed(directory.relative_to(root()).parents), directory.relative_to(root())):
        inside = root() / place
        inside.mkdir(exist_ok=True)
        if inside.is_symlink() and inside != root():
            raise _Refused(f"{inside} is a link, and what it holds would go elsewhere")


def _about(cache: CompileCache) -> dict[str, Any]:
    return {"format": _FORMAT, "fluxcli": __version__, **cache.environment}


def _shown(value: object) -> str:
    """As it may stand on a terminal, whoever wrote it."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:80])
