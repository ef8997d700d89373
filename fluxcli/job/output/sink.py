"""Where a job's images go: bytes put on disk beside their place, then published under their names all at once.

`images` itself may be a link to another disk; inside it no link is followed, and nothing is written or removed but
under the names that fluxcli gives: images/ID.png and images/NNNN/ID.png, and their temporaries.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fluxcli.core.files import TEMPORARY, kind_of, temporary_name, write_all
from fluxcli.job.output.rows import ID, SHARD, SUFFIX

FILES_PER_DIRECTORY = 10_000
ROOT = "images/"
_FILE = re.compile(rf"{ID}\.{SUFFIX}").fullmatch
_TEMPORARY = re.compile(rf"\.{ID}\.{SUFFIX}(\.[0-9a-f]{{8}})?{re.escape(TEMPORARY)}").fullmatch
_SHARD = re.compile(SHARD).fullmatch
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Written:
    """An image in its temporary file, on disk for sure, ready to be committed. `temporary` and `file_name` are relative
    to the job's directory."""

    temporary: str
    file_name: str
    sha256: str
    finished_at: str


class Entry(NamedTuple):
    """What lies in a folder of images: `kind` is "image" or "temporary" where it is one of ours by name and kind, else
    "other"; `mode` its st_mode."""

    name: str
    kind: str
    mode: int


class FileSink:
    """Images as files below DIR/images, at most `FILES_PER_DIRECTORY` in one directory.

    Safe to call from several threads.
    """

    def __init__(self, directory: Path, suffix: str) -> None:
        self._directory, self._suffix = directory, suffix
        self._root: int | None = None  # descriptor of images/
        self._made = {ROOT}  # directories whose names last
        self._making = threading.Lock()

    def place(self, id: str, number: int) -> str:
        """The name of the job's `number`-th image."""
        shard = number // FILES_PER_DIRECTORY
        return f"{ROOT}{f'{shard:04d}/' if shard else ''}{id}{self._suffix}"

    def path(self, file_name: str) -> Path:
        return self._directory / file_name

    def put(self, file_name: str, data: bytes, temporary: str | None = None) -> Written:
        """Puts an image beside its place, on disk for sure; under the name that `temporary` has, if it is given."""
        folder, name = _split(file_name)
        temporary, now = _split(temporary)[1] if temporary else temporary_name(name), utc_now()
        with self._folder(folder, make=True) as above, self._named(file_name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o666, dir_fd=above)
            try:
                write_all(descriptor, data)
                # The row's own time, to the nanosecond: at the next start this vouches that nobody wrote here since.
                os.utime(descriptor, ns=(nanoseconds(now),) * 2)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return Written(folder + temporary, file_name, hashlib.sha256(data).hexdigest(), now)

    def publish(self, written: Sequence[Written]) -> None:
        """Gives images their names, which last when this returns."""
        folders: dict[str, list[Written]] = {}
        for each in written:
            folders.setdefault(_split(each.file_name)[0], []).append(each)
        for folder, images in folders.items():
            with self._folder(folder) as above:
                for each in images:
                    old, new = _split(each.temporary)[1], _split(each.file_name)[1]
                    with self._named(each.file_name):
                        os.replace(old, new, src_dir_fd=above, dst_dir_fd=above)
                with self._named(folder):
                    os.fsync(above)

    def stat(self, name: str) -> os.stat_result:
        """Of a file or a link itself."""
        folder, own = _split(name)
        with self._folder(folder) as above, self._named(name):
            return os.lstat(own, dir_fd=above)

    def discard(self, name: str) -> None:
        """Removes a file or a link, or an empty directory, if it is there."""
        folder, own = _split(name)
        with contextlib.suppress(FileNotFoundError), self._folder(folder) as above, self._named(name):
            if stat.S_ISDIR(os.lstat(own, dir_fd=above).st_mode):
                os.rmdir(own, dir_fd=above)
            else:
                os.unlink(own, dir_fd=above)

    def open(self, file_name: str) -> int:
        """A descriptor of an image, for reading; a link is no image.

        Raises:
            OSError: there is none, or it is no plain file.
        """
        folder, name = _split(file_name)
        with self._folder(folder) as above, self._named(file_name):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(name, flags, dir_fd=above)
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                os.close(descriptor)
                raise OSError(errno.EINVAL, f"is {kind_of(mode)}")
        return descriptor

    def vouch(self, file_name: str, finished_at: str) -> None:
        """Gives an image the time of its row, which says that it is the row's."""
        descriptor = self.open(file_name)
        try:
            os.utime(descriptor, ns=(nanoseconds(finished_at),) * 2)
        finally:
            os.close(descriptor)

    def ready(self) -> None:
        """Makes images/ at a job's first start, and its names last: a killed process may not have come to that."""
        with contextlib.suppress(FileExistsError), self._named(ROOT):
            os.mkdir(self._directory / ROOT)
        with self._folder(ROOT) as root, self._named(ROOT):
            os.fsync(root)

    def folders(self) -> list[str]:
        """images/ and every directory of ours in it; none where there is no images/."""
        try:
            with self._folder(ROOT) as root, os.scandir(root) as entries:
                shards = [f"{ROOT}{entry.name}/" for entry in entries if _is_shard(entry)]
        except FileNotFoundError:
            return []
        return [ROOT, *sorted(shards)]

    def entries(self, folder: str) -> Iterator[Entry]:
        """What lies in one of `folders`, those folders aside."""
        with self._folder(folder) as above, os.scandir(above) as entries:
            for entry in entries:
                if folder == ROOT and _is_shard(entry):
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # a job runs here, and this has its name by now
                    continue
                yield Entry(entry.name, _kind(entry.name, found.st_mode), found.st_mode)

    def images(self, folder: str) -> tuple[dict[str, int], list[Entry]]:
        """The images of a folder with their times of change in nanoseconds, and what else lies there. As `entries`, for
        directories of millions."""
        found: dict[str, int] = {}
        others: list[Entry] = []
        with self._folder(folder) as above, os.scandir(above) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False) and entry.name[0] != ".":
                    found[entry.name] = entry.stat(follow_symlinks=False).st_mtime_ns
                elif not (folder == ROOT and _is_shard(entry)):
                    status = entry.stat(follow_symlinks=False)
                    others.append(Entry(entry.name, _kind(entry.name, status.st_mode), status.st_mode))
        return found, others

    def close(self) -> None:
        if self._root is not None:
            os.close(self._root)
            self._root = None

    @contextlib.contextmanager
    def _folder(self, folder: str, make: bool = False) -> Iterator[int]:
        """The descriptor of images/ or of images/NNNN/."""
        with self._making, self._named(folder):
            if self._root is None:
                self._root = os.open(self._directory / ROOT, _DIRECTORY)
            if make and folder not in self._made:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder[len(ROOT) : -1], dir_fd=self._root)
                os.fsync(self._root)
                self._made.add(folder)
        if folder == ROOT:
            yield self._root
            return
        with self._named(folder):
            descriptor = os.open(folder[len(ROOT) : -1], _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Names the file in the disk's errors, which know it by a part of its name."""
        try:
            yield
        except OSError as error:
            if "/" not in str(error.filename or ""):
                error.filename = str(self._directory / name)
            raise


def may_remove(entry_name: str) -> bool:
    """Whether a file of this name in a folder of images is one that fluxcli makes."""
    return bool(_FILE(entry_name) or _TEMPORARY(entry_name))


def _split(file_name: str) -> tuple[str, str]:
    folder, slash, name = file_name.rpartition("/")
    return folder + slash, name


def _is_shard(entry: "os.DirEntry[str]") -> bool:
    return _SHARD(entry.name) is not None and entry.is_dir(follow_symlinks=False)


def _kind(name: str, mode: int) -> str:
    if _TEMPORARY(name) and (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        return "temporary"
    return "image" if _FILE(name) and stat.S_ISREG(mode) else "other"


def utc_now() -> str:
    """The time as every file of a job writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@lru_cache(maxsize=1024)  # a batch's rows share a few stamps
def nanoseconds(stamp: str) -> int:
    """A time of a row as the file's own."""
    moment = datetime.fromisoformat(stamp)
    return int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000
