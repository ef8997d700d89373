"""A zip that may come from somebody else: a header lists every member with its size and SHA-256, a signature by the
user's key covers the header, and nothing is unpacked before what it claims is found within bounds.

Of an archive without a good signature only the header need be read: no other byte of it is looked at.
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fluxcli.core.errors import CacheError, Remark
from fluxcli.core.ownership import open_to_others

HEADER, SIGNATURE = "header.json", "signature"
MOST_MEMBERS = 20_000
MOST_BYTES, MOST_IN_ALL = 2**29, 2**31  # unpacked: of a member, of all
_MOST_DIRECTORY = _MOST_HEADER = 2**23
_MEMBERS = "members"  # in the header: name -> [bytes, SHA-256]
_KEY_BYTES, _SHORTEST_KEY, _LONGEST_KEY_FILE = 32, 16, 2**16
_PURPOSE = b"fluxcli sealed archive 1\n"  # signatures of this kind serve for nothing else
# A zip's last record without a comment, and what stands before it in one of the large kind.
_END, _END_BYTES, _LARGE, _LARGE_BYTES = b"PK\5\6", 22, b"PK\6\7", 20


class Damaged(ValueError):
    """What is wrong with an archive, in a few words."""


def make_key(file: Path) -> bool:
    """Makes a key where there is none; whether it did. Only this user can read it."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise CacheError(f"--key {file}: cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as opened:
        opened.write(f"{secrets.token_hex(_KEY_BYTES)}\n")
    return True


def read_key(file: Path) -> bytes:
    """Raises CacheError for a file that is none, that is too short, or that others could know or change."""
    try:
        if reason := open_to_others(file):
            raise CacheError(f"--key {file}: {reason}, so it proves nothing; use a key that nobody else can change")
        if not file.is_file():
            raise CacheError(f"--key {file}: no such file; warmup --export makes one")
        if file.stat().st_mode & 0o077:
            warnings.warn(f"--key {file}: other users can read it, and sign with it: chmod 600", Remark, stacklevel=2)
        with file.open("rb") as opened:
            key = opened.read(_LONGEST_KEY_FILE).strip()
    except OSError as error:
        raise CacheError(f"--key {file}: cannot be read: {error.strerror}") from error
    if len(key) < _SHORTEST_KEY:
        raise CacheError(f"--key {file}: shorter than {_SHORTEST_KEY} bytes; warmup --export makes a good one")
    return key


def write(file: BinaryIO, about: dict[str, Any], members: Iterable[tuple[str, bytes]], key: bytes | None) -> int:
    """Writes an archive, signed where there is a key. Returns the number of members.

    Raises:
        Damaged: it is over the bounds, and nobody could open it.
    """
    listed: dict[str, tuple[int, str]] = {}
    try:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1, allowZip64=False) as archive:
            for name, data in members:
                listed[name] = len(data), hashlib.sha256(data).hexdigest()
                archive.writestr(name, data)
            _check_bounds([size for size, _ in listed.values()])
            header = json.dumps({**about, _MEMBERS: listed}).encode()
            archive.writestr(HEADER, header)
            if key is not None:
                archive.writestr(SIGNATURE, _signature(header, key))
    except zipfile.LargeZipFile as error:
        raise Damaged(f"more than a cache can be: {error}") from error
    return len(listed)


class Sealed:
    """An open archive that is within bounds. Its members are read one by one, each checked against the header.

    Attributes:
        about: what was written with it.
        sizes: its members' names and bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._archive = _opened(file)
        self._header = self._archive.read(HEADER)
        self.about: dict[str, Any] = json.loads(self._header.decode())
        if (members := self.about.pop(_MEMBERS, None)) is None:
            raise Damaged("its header lists no members")
        self._digests = {name: digest for name, (_, digest) in members.items()}
        self.sizes: dict[str, int] = {name: size for name, (size, _) in members.items()}
        there = {info.filename: info.file_size for info in self._archive.infolist()}
        del there[HEADER]
        self._signature = self._archive.read(SIGNATURE) if there.pop(SIGNATURE, None) is not None else None
        if unlisted := there.keys() - self.sizes.keys():
            raise Damaged(f"{min(unlisted)[:80]!r} in it has no place in its header")
        if there != self.sizes:
            raise Damaged("it does not hold what its header lists")

    @property
    def signed(self) -> bool:
        """Whether there is a signature, good or not."""
        return self._signature is not None

    def signed_with(self, key: bytes) -> bool:
        """Whether the header, and with it every member, is as somebody who has the key wrote it."""
        return self._signature is not None and hmac.compare_digest(self._signature, _signature(self._header, key))

    def read(self, name: str) -> bytes:
        """A member; the bytes that the header lists, or Damaged."""
        with _as_damage():
            data = self._archive.read(name)
        if hashlib.sha256(data).hexdigest() != self._digests[name]:
            raise Damaged(f"{name} in it is not what its header lists")
        return data


@contextmanager
def opened(path: Path) -> Iterator[Sealed]:
    """Raises Damaged for what is no archive, was cut or changed, or is over the bounds; OSError."""
    # Without the flag, opening a FIFO would wait for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        with _as_damage():
            sealed = Sealed(file)
        yield sealed


@contextmanager
def _as_damage() -> Iterator[None]:
    """Whatever parsers make of bytes that nobody wrote for them."""
    try:
        yield
    except (OSError, Damaged):
        raise
    except Exception as error:
        raise Damaged(str(error)[:200]) from error


def _opened(file: BinaryIO) -> zipfile.ZipFile:
    """The zip, of which its directory alone has been read."""
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise Damaged("it is not a plain file")
    file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES - _LARGE_BYTES))
    before, end = (tail := file.read())[:-_END_BYTES], tail[-_END_BYTES:]
    if end[:4] != _END or end[-2:] != b"\0\0" or before[:4] == _LARGE:
        raise Damaged("it does not end as such a file does")
    if int.from_bytes(end[12:16], "little") > _MOST_DIRECTORY:  # which zipfile reads whole
        raise Damaged(f"over {MOST_MEMBERS:,} members")
    archive = zipfile.ZipFile(file)
    infos = archive.infolist()
    if len(infos) != len(archive.NameToInfo):
        raise Damaged("a name in it stands twice")
    most = {HEADER: _MOST_HEADER, SIGNATURE: 64}
    if any(info.file_size > most.get(info.filename, MOST_BYTES) for info in infos):
        raise Damaged("a member is larger than it can be in a cache")
    _check_bounds([info.file_size for info in infos if info.filename not in most])
    return archive


def _check_bounds(sizes: list[int]) -> None:
    if len(sizes) > MOST_MEMBERS:
        raise Damaged(f"over {MOST_MEMBERS:,} members")
    if max(sizes, default=0) > MOST_BYTES or sum(sizes) > MOST_IN_ALL:
        raise Damaged(f"more than a cache can be: {sum(sizes) / 2**30:.1f} GiB")


def _signature(header: bytes, key: bytes) -> bytes:
    return hmac.new(key, _PURPOSE + header, "sha256").hexdigest().encode()
