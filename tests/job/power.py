"""Power cuts, simulated as POSIX lets them happen: every operation of a job on its directory is recorded, and of those
that no fsync made last any part may have reached the disk, in any order, writes also in part or as zeros.

An operation on a file's bytes, size or times lasts once that file was fsynced after it; one on a name, once the
directory that holds it was.
"""

import hashlib
import os
import pickle
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

T0 = 1_700_000_000 * 10**9  # the time of a file whose own was not written down
TORN = ("half", "most", "zeros", "head0", "tail0")


class Op(NamedTuple):
    """One operation: `node` is the file or the directory, a number; `what` is "name", "write", "truncate", "utime",
    "fsync" or "told", the last being no operation but what the job told to be committed."""

    what: str
    node: int
    value: Any


@dataclass
class Disk:
    """Names and contents: `names` maps (directory, name) to a node, `files` a node to its bytes and time."""

    names: dict[tuple[int, str], int] = field(default_factory=dict)
    files: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    directories: set[int] = field(default_factory=lambda: {0})

    def apply(self, op: Op, at: int, torn: str | None = None) -> None:
        data, _ = self.files.get(op.node, (b"", T0))
        if op.what == "name":
            for name, node, is_directory in op.value:
                if node is None:
                    self.names.pop((op.node, name), None)
                    continue
                self.names[op.node, name] = node
                if is_directory:
                    self.directories.add(node)
        elif op.what == "write":
            offset, new = op.value
            new = _torn(new, torn)
            data = data.ljust(offset, b"\0")
            self.files[op.node] = data[:offset] + new + data[offset + len(new) :], T0 + at
        elif op.what == "truncate":
            self.files[op.node] = data[: op.value].ljust(op.value, b"\0"), T0 + at
        elif op.what == "utime":
            self.files[op.node] = data, op.value

    def digest(self) -> bytes:
        return hashlib.sha256(repr(sorted(self._tree(0, ""))).encode()).digest()

    def write_to(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for name, node in self._tree(0, ""):
            path = directory / name
            if node is None:
                path.mkdir()
            else:
                path.write_bytes(node[0])
                os.utime(path, ns=(node[1],) * 2)

    def _tree(self, directory: int, prefix: str) -> Iterator[tuple[str, tuple[bytes, int] | None]]:
        for (above, name), node in sorted(self.names.items()):
            if above == directory:
                if node in self.directories:
                    yield prefix + name, None
                    yield from self._tree(node, f"{prefix}{name}/")
                else:
                    yield prefix + name, self.files.get(node, (b"", T0))


def _torn(data: bytes, how: str | None) -> bytes:
    half = len(data) // 2
    if how == "half":
        return data[:half]
    if how == "most":
        return data[:-1]
    if how == "zeros":
        return bytes(len(data))
    if how == "head0":
        return bytes(min(half, 4096)) + data[min(half, 4096) :]
    return data[:half] + bytes(len(data) - half) if how == "tail0" else data


class Recorder:
    """Writes down every operation of this process below `root` into `log`, which survives its death."""

    def __init__(self, root: Path, log: Path) -> None:
        self._root, self._log = str(root), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._disk = Disk()
        for at, op in enumerate(read(log)):
            self._disk.apply(op, at)
        self._next = 1 + max([0, *self._disk.names.values()])
        self._open: dict[int, int] = {}  # descriptor -> node
        self._real = {name: getattr(os, name) for name in HOOKED}
        self._one = threading.RLock()

    def start(self) -> None:
        for name in HOOKED:
            setattr(os, name, self._locked(getattr(self, f"_on_{name}")))

    def told(self, ids: list[str]) -> None:
        with self._one:
            self._note(Op("told", 0, ids))

    def _locked(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._one:
                return hook(*args, **kwargs)

        return call

    def _note(self, op: Op) -> None:
        self._disk.apply(op, 0)
        self._real["write"](self._log, pickle.dumps(op))

    def _find(self, path: Any, dir_fd: int | None) -> tuple[int, str] | None:
        """The directory's node and the name in it, of what lies below the root."""
        text = os.fspath(path)
        if dir_fd is not None:
            return (self._open[dir_fd], text) if dir_fd in self._open else None
        relative = os.path.relpath(text, self._root)
        if relative.startswith(".."):
            return None
        *above, name = relative.split("/")
        directory = 0
        for part in above:
            if (directory, part) not in self._disk.names:
                return None  # the call is about to fail
            directory = self._disk.names[directory, part]
        return directory, name

    def _node(self, place: tuple[int, str]) -> int | None:
        return 0 if place[1] == "." else self._disk.names.get(place)

    def _make(self, place: tuple[int, str], is_directory: bool) -> int:
        node, self._next = self._next, self._next + 1
        self._note(Op("name", place[0], [(place[1], node, is_directory)]))
        return node

    def _on_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = None if isinstance(path, int) else self._find(path, dir_fd)
        descriptor: int = self._real["open"](path, flags, mode, dir_fd=dir_fd)
        self._open.pop(descriptor, None)
        if place is not None:
            node = self._node(place)
            self._open[descriptor] = self._make(place, False) if node is None else node
        return descriptor

    def _on_mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        place = self._find(path, dir_fd)
        self._real["mkdir"](path, mode, dir_fd=dir_fd)
        if place is not None:
            self._make(place, True)

    def _on_write(self, descriptor: int, data: bytes) -> int:
        written: int = self._real["write"](descriptor, data)
        if descriptor in self._open:
            node = self._open[descriptor]
            self._note(Op("write", node, (len(self._disk.files.get(node, (b"",))[0]), bytes(data[:written]))))
        return written

    def _on_pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        written: int = self._real["pwrite"](descriptor, data, offset)
        if descriptor in self._open:
            self._note(Op("write", self._open[descriptor], (offset, bytes(data[:written]))))
        return written

    def _on_ftruncate(self, descriptor: int, length: int) -> None:
        self._real["ftruncate"](descriptor, length)
        if descriptor in self._open:
            self._note(Op("truncate", self._open[descriptor], length))

    def _on_utime(self, path: Any, times: Any = None, *, ns: tuple[int, int] | None = None, **kwargs: Any) -> None:
        self._real["utime"](path, times, **({"ns": ns} if ns else {}), **kwargs)
        node = self._open.get(path) if isinstance(path, int) else None
        if node is not None and ns is not None:
            self._note(Op("utime", node, ns[1]))

    def _on_fsync(self, descriptor: int) -> None:
        node = self._open.get(descriptor)
        if node is not None and node not in self._disk.directories:
            known = len(self._disk.files.get(node, (b"",))[0])
            size = os.fstat(descriptor).st_size
            if size > known:  # written through a file object
                with open(f"/proc/self/fd/{descriptor}", "rb") as file:
                    self._note(Op("write", node, (known, file.read()[known:])))
        self._real["fsync"](descriptor)
        if node is not None:
            self._note(Op("fsync", node, None))

    def _on_replace(self, old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        before, after = self._find(old, src_dir_fd), self._find(new, dst_dir_fd)
        self._real["replace"](old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        if before is not None and after is not None:
            assert before[0] == after[0], "a file moves within its directory"
            self._note(Op("name", before[0], [(before[1], None, False), (after[1], self._disk.names[before], False)]))

    def _on_unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        place = self._find(path, dir_fd)
        self._real["unlink"](path, dir_fd=dir_fd)
        if place is not None:
            self._note(Op("name", place[0], [(place[1], None, False)]))


HOOKED = ("open", "mkdir", "write", "pwrite", "ftruncate", "utime", "fsync", "replace", "unlink")


def snapshot(root: Path, log: Path, told: list[str]) -> None:
    """Begins a log with what is on disk already, for sure."""
    recorder = Recorder(root, log)
    for path in [root, *sorted(root.rglob("*"))]:
        node = 0
        if path != root:
            node = recorder._make(recorder._find(path, None), path.is_dir())
        if path.is_file():
            recorder._note(Op("write", node, (0, path.read_bytes())))
            recorder._note(Op("utime", node, path.stat().st_mtime_ns))
    for node in {0, *recorder._disk.names.values()}:
        recorder._note(Op("fsync", node, None))
    recorder.told(told)


def read(log: Path) -> list[Op]:
    ops = []
    with log.open("rb") as file:
        while True:
            try:
                ops.append(pickle.load(file))
            except EOFError:
                return ops


def states(ops: list[Op], first: int, share: float = 1.0) -> Iterator[tuple[int, str, Disk]]:
    """Every state after a power cut worth trying, from operation `first` on, without repeats, or a share of them and
    all after the last: the number of operations before it, what of them is missing, and the disk."""
    chance, seen = random.Random(3), set()
    for cut in range(max(1, first), len(ops) + 1):
        if ops[cut - 1].what == "told" and cut < len(ops):
            continue
        for what, missing, torn in _cases(ops, _pending(ops, cut), chance):
            if share < 1 and cut < len(ops) and chance.random() >= share:
                continue
            disk = Disk()
            for at, op in enumerate(ops[:cut]):
                if at not in missing:
                    disk.apply(op, at, torn.get(at))
            digest = disk.digest()
            if digest not in seen:
                seen.add(digest)
                yield cut, what, disk


def told(ops: list[Op], cut: int) -> set[str]:
    """Ids that the job had told to be committed."""
    return {id for op in ops[:cut] if op.what == "told" for id in op.value}


def _pending(ops: list[Op], cut: int) -> list[int]:
    """Operations that no fsync made last."""
    left, synced = [], set()
    for at in range(cut - 1, -1, -1):
        op = ops[at]
        if op.what == "fsync":
            synced.add(op.node)
        elif op.what != "told" and op.node not in synced:
            left.append(at)
    return left[::-1]


def _cases(ops: list[Op], pending: list[int], chance: random.Random) -> Iterator[tuple[str, set[int], dict[int, str]]]:
    everything = set(pending)
    yield "all there", set(), {}
    yield "none of it", everything, {}
    for at in pending:
        yield f"without {at}", {at}, {}
        yield f"only {at}", everything - {at}, {}
        for how in TORN if ops[at].what == "write" else ():
            yield f"{at} {how}", set(), {at: how}
            yield f"only {at}, {how}", everything - {at}, {at: how}
    for number in range(3 if len(pending) > 2 else 0):
        missing = {at for at in pending if chance.random() < 0.5}
        writes = [at for at in pending if ops[at].what == "write" and at not in missing]
        yield f"random {number}", missing, {at: chance.choice(TORN) for at in writes if chance.random() < 0.4}
