"""Cache archives from somebody else: whatever is in them, no code runs, nothing is written, memory stays bounded."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from torch.compiler import _cache
from torch.utils._appending_byte_serializer import AppendingByteSerializer

from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import CacheError
from fluxcli.engine.runtime import cache_archive, sealed
from fluxcli.engine.runtime.compile_cache import CompileCache, root
from fluxcli.models.checkpoints import resolve
from tests.cli.conftest import files

KEY = b"a key of the user's, 32 bytes lon"
CHOICES = "choices/choices.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompileCache:
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # restored afterwards
    return CompileCache(resolve("tiny"), EngineConfig("cpu", "float32", True))


def header(cache: CompileCache, contents: dict[str, bytes], /, **changed: object) -> bytes:
    """As anyone can write it: nothing in it is secret."""
    listed = {name: (len(data), sha256(data).hexdigest()) for name, data in contents.items()}
    return json.dumps({**cache_archive._about(cache), "members": listed, **changed}).encode()


def packed(contents: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(file := BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return file.getvalue()


def archive(cache: CompileCache, contents: dict[str, bytes], key: bytes | None = None, /, **changed: object) -> bytes:
    """A forged archive; with a key, one that its owner signed."""
    head = header(cache, contents, **changed)
    signature = {} if key is None else {sealed.SIGNATURE: sealed._signature(head, key)}
    return packed({**contents, sealed.HEADER: head, **signature})


def artifacts(kind: str, key: str, content: bytes) -> bytes:
    """What torch's save_cache_artifacts would give."""
    entry = _cache.CacheArtifactFactory.create(kind, key, content)
    serializer = AppendingByteSerializer(serialize_fn=_cache._serialize_single_cache)
    serializer.extend([(kind, [entry])])
    return serializer.to_bytes()


class Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def here(cache: CompileCache, name: str) -> str:
    return f"files/{cache.directory.relative_to(root()).as_posix()}/{name}"


Forged = Callable[[CompileCache, Path], bytes]
_cache.CacheArtifactManager._ensure_cache_artifacts_registered()


def pickled(path: Path) -> bytes:
    return artifacts("inductor", "fabcdef", pickle.dumps(Payload(path / "PWNED")))


FORGED: dict[str, tuple[Forged, str]] = {
    "a pickle that runs": (lambda cache, path: archive(cache, {"torch.bin": pickled(path)}), "is not signed"),
    "an absolute path for torch": (
        lambda cache, path: archive(cache, {"torch.bin": artifacts("autotune", str(path / "PWNED"), b"x")}),
        "is not signed",
    ),
    "a library": (lambda cache, path: archive(cache, {here(cache, "inductor/ab/x.so"): b"\x7fELF"}), "is not signed"),
    "an object": (lambda cache, path: archive(cache, {"files/quack/x.o": b"\x7fELF"}), "is not signed"),
    "another's signature": (
        lambda cache, path: archive(cache, {"torch.bin": pickled(path)}, b"another key of 32 bytes or more.."),
        "give --key",
    ),
    "choices that are not JSON": (lambda cache, path: archive(cache, {CHOICES: b"not json"}), "is not JSON"),
    "choices too deep": (lambda cache, path: archive(cache, {CHOICES: b"[" * 10**5}), "is not JSON"),
    "choices that are a list": (lambda cache, path: archive(cache, {CHOICES: b"[]"}), "not a table of choices"),
    "choices in tables without end": (
        lambda cache, path: archive(cache, {CHOICES: b'{"a": {"b": {"c": {"d": 1}}}}'}),
        "not a table of choices",
    ),
    "a choice that a terminal obeys": (
        lambda cache, path: archive(cache, {CHOICES: b'{"a": "\\u001b[2J"}'}),
        "not a table of choices",
    ),
    "a choice that a library would take as it is": (
        lambda cache, path: archive(cache, {CHOICES: json.dumps({"a": "cublaslt " + "00" * 64}).encode()}),
        "not a table of choices",
    ),
    "a choice beyond all numbers": (
        lambda cache, path: archive(cache, {CHOICES: b'{"a": Infinity, "b": 1e999}'}),
        "not a table of choices",
    ),
    "choices of 4 MB": (lambda cache, path: archive(cache, {CHOICES: b" " * 2**22}), "more choices in it"),
    "too many files of choices": (
        lambda cache, path: archive(cache, {f"choices/{'a' * i}.json": b"{}" for i in range(1, 18)}),
        "more choices in it",
    ),
    "a bomb": (lambda cache, path: archive(cache, {"torch.bin": bytes(2**29 + 1)}), "larger than it can be"),
    "a bomb in many parts": (
        lambda cache, path: claiming(archive(cache, {f"files/quack/{i}.o": b"x" for i in range(5)}), 2**29),
        "more than a cache can be",
    ),
    "a bomb for a header": (
        lambda cache, path: packed({sealed.HEADER: b" " * 2**24, CHOICES: b"{}"}),
        "larger than it can be",
    ),
    "a directory without end": (
        lambda cache, path: archive(cache, {})[:-22] + b"PK\5\6" + bytes(8) + b"\xff" * 8 + b"\0\0",
        "over 20,000 members",
    ),
    "a directory of the large kind": (
        lambda cache, path: (good := archive(cache, {}))[:-22] + b"PK\6\7" + bytes(16) + good[-22:],
        "does not end as",
    ),
    "a name twice": (lambda cache, path: twice(cache), "stands twice"),
    "more than it lists": (
        lambda cache, path: packed({sealed.HEADER: header(cache, {}), "files/quack/x.o": b"x"}),
        "has no place in its header",
    ),
    "less than it lists": (
        lambda cache, path: packed({sealed.HEADER: header(cache, {CHOICES: b"{}"})}),
        "does not hold what its header lists",
    ),
    "another digest": (
        lambda cache, path: archive(cache, {CHOICES: b"{}"}, members={CHOICES: [2, "00" * 32]}),
        "is not what its header lists",
    ),
    "cut short": (lambda cache, path: archive(cache, {CHOICES: b"{}"})[:-30], "does not end as"),
    "an empty file": (lambda cache, path: b"", "does not end as"),
    "a header that is no table": (lambda cache, path: packed({sealed.HEADER: b"[]"}), "damaged"),
    "a header too deep": (lambda cache, path: packed({sealed.HEADER: b"[" * 10**5}), "damaged"),
    "members that are no list": (lambda cache, path: archive(cache, {}, members=7), "damaged"),
    "members without sizes": (lambda cache, path: archive(cache, {CHOICES: b"{}"}, members={CHOICES: 7}), "damaged"),
    "a header that a terminal obeys": (
        lambda cache, path: archive(cache, {}, torch="\x1b]0;owned\x07" + "x" * 10**6),
        "torch ?]0;owned?xxx",
    ),
}  # fmt: skip


def claiming(data: bytes, size: int) -> bytes:
    """Every member says that it is so large, where zipfile reads it."""
    changed = bytearray(data)
    start = data.find(b"PK\1\2")
    while start >= 0:
        if data[start + 46 :].startswith(b"files/"):
            changed[start + 24 : start + 28] = size.to_bytes(4, "little")
        start = data.find(b"PK\1\2", start + 4)
    return bytes(changed)


def twice(cache: CompileCache) -> bytes:
    with zipfile.ZipFile(file := BytesIO(), "w") as made, pytest.warns(UserWarning, match="Duplicate"):
        for data in (b"{}", b'{"a": "b"}'):
            made.writestr(CHOICES, data)
        made.writestr(sealed.HEADER, header(cache, {CHOICES: b"{}"}))
    return file.getvalue()


def refused(cache: CompileCache, file: Path, key: bytes | None) -> str:
    """The message; that it is one line, and that nothing came of the rest, is checked here."""
    before = files(file.parent)
    with pytest.raises(CacheError) as told:
        cache_archive.import_(cache, file, key)
    assert files(file.parent) == before
    assert not (file.parent / "PWNED").exists()
    message = str(told.value)
    assert message.startswith(f"--import {file}: ") and message.isprintable() and len(message) < 1500
    return message


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_archive_is_refused_before_anything_of_it_is_used(
    case: str, cache: CompileCache, tmp_path: Path
) -> None:
    forge, reason = FORGED[case]
    (tmp_path / "evil.zip").write_bytes(forge(cache, tmp_path))
    assert reason in refused(cache, tmp_path / "evil.zip", None)


def test_the_payloads_would_have_run(cache: CompileCache, tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "PWNED")))
    assert (tmp_path / "PWNED").is_dir()
    _cache.CacheArtifactManager.populate_caches(
        _cache.CacheArtifactManager.deserialize(artifacts("autotune", str(tmp_path / "written"), b"x"))
    )
    assert (tmp_path / "written").read_bytes() == b"x"


NO_PLACE = (
    "files/../../x.so", "files//etc/x.so", "/etc/x.so", "x.so", "files/", "files/x.so", "files/quack/../x.so",
    "files/quack/.x.so", "files/quack\\x.so", "files/quack/x.py", "files/quack/x", "files/quack/x.so/",
    "files/compile/elsewhere/flux/triton/x.so", "choices/../x.json", "choices/x.py", "choices/.json",
    "choices/a/x.json", "torch.bin/x", "files/quack/\x1b[2J.so", "files/quack/é.so",
)  # fmt: skip


@pytest.mark.parametrize("name", NO_PLACE)
@pytest.mark.parametrize("key", [None, KEY], ids=["unsigned", "signed"])
def test_a_name_that_has_no_place_in_a_cache_is_refused(
    name: str, key: bytes | None, cache: CompileCache, tmp_path: Path
) -> None:
    (tmp_path / "evil.zip").write_bytes(archive(cache, {name: b"x"}, key))
    assert "has no place" in refused(cache, tmp_path / "evil.zip", key)


@pytest.mark.parametrize("name", ["../../PWNED", "/PWNED", "a/../../PWNED", ".profile"])
def test_torchs_own_names_are_held_to_its_folder_though_signed(name: str, cache: CompileCache, tmp_path: Path) -> None:
    (tmp_path / "mine.zip").write_bytes(archive(cache, {"torch.bin": artifacts("autotune", name, b"x")}, KEY))
    assert "has no place" in refused(cache, tmp_path / "mine.zip", KEY)


def test_what_torch_cannot_read_is_refused_though_signed(cache: CompileCache, tmp_path: Path) -> None:
    (tmp_path / "mine.zip").write_bytes(archive(cache, {"torch.bin": b"x"}, KEY))
    assert "torch cannot read" in refused(cache, tmp_path / "mine.zip", KEY)


def test_a_list_of_triton_names_no_file_elsewhere(cache: CompileCache, tmp_path: Path) -> None:
    listed = json.dumps({"child_paths": {"a": "../../../../etc/passwd"}}).encode()
    (tmp_path / "mine.zip").write_bytes(archive(cache, {here(cache, "triton/K/__grp__a.json"): listed}, KEY))
    assert "has no place" in refused(cache, tmp_path / "mine.zip", KEY)


def digest(data: bytes) -> bytes:
    return sha256(data).hexdigest().encode()


CHANGED: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "a member": lambda contents: {**contents, "files/quack/x.o": b"evil"},
    "a member and the header": lambda contents: {
        **contents,
        "files/quack/x.o": b"evil",
        sealed.HEADER: contents[sealed.HEADER].replace(digest(b"good"), digest(b"evil")),
    },
    "the signature": lambda contents: {**contents, sealed.SIGNATURE: b"0" * 64},
    "no signature": lambda contents: {name: data for name, data in contents.items() if name != sealed.SIGNATURE},
    "an empty signature": lambda contents: {**contents, sealed.SIGNATURE: b""},
    "a signature of other letters": lambda contents: {**contents, sealed.SIGNATURE: b"\xff" * 64},
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_nothing_of_a_signed_archive_can_be_changed(case: str, cache: CompileCache, tmp_path: Path) -> None:
    good = archive(cache, {"files/quack/x.o": b"good"}, KEY)
    with zipfile.ZipFile(BytesIO(good)) as opened:
        contents = {name: opened.read(name) for name in opened.namelist()}
    (tmp_path / "mine.zip").write_bytes(packed(CHANGED[case](contents)))
    refused(cache, tmp_path / "mine.zip", KEY)
    (tmp_path / "mine.zip").write_bytes(good)
    assert cache_archive.import_(cache, tmp_path / "mine.zip", KEY) == 1
    assert (root() / "quack" / "x.o").read_bytes() == b"good"


def test_no_bit_of_a_signed_archive_turns_into_other_code(cache: CompileCache, tmp_path: Path) -> None:
    """Whatever bit turns, what is taken in is what was signed."""
    good, file = archive(cache, {"files/quack/x.o": b"good"}, KEY), tmp_path / "mine.zip"
    for position in range(0, len(good), 7):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        try:
            cache_archive.import_(cache, file, KEY)
        except CacheError:
            assert not (root() / "quack").exists()
        else:
            assert (root() / "quack" / "x.o").read_bytes() == b"good"
            (root() / "quack" / "x.o").unlink()
            (root() / "quack").rmdir()


def test_a_key_asks_for_a_signature_even_where_there_is_no_code(cache: CompileCache, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(archive(cache, {CHOICES: b'{"a": "sdpa"}'}))
    assert "it is not signed" in refused(cache, tmp_path / "data.zip", KEY)
    assert cache_archive.import_(cache, tmp_path / "data.zip", None) == 1
    assert cache.read("choices.json")["a"] == "sdpa"


@pytest.mark.parametrize("link", ["quack", "compile"])
def test_no_link_in_a_cache_is_followed(link: str, cache: CompileCache, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root() / link).symlink_to(tmp_path / "elsewhere")
    members = {"files/quack/x.o": b"x"} if link == "quack" else {here(cache, "triton/K/x.cubin"): b"x"}
    (tmp_path / "mine.zip").write_bytes(archive(cache, members, KEY))
    assert "is a link" in refused(cache, tmp_path / "mine.zip", KEY)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_link_in_a_files_place_is_replaced_and_not_followed(cache: CompileCache, tmp_path: Path) -> None:
    (root() / "quack").mkdir()
    (tmp_path / "mine").write_bytes(b"mine")
    (root() / "quack" / "x.o").symlink_to(tmp_path / "mine")
    (tmp_path / "mine.zip").write_bytes(archive(cache, {"files/quack/x.o": b"x"}, KEY))
    cache_archive.import_(cache, tmp_path / "mine.zip", KEY)
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (root() / "quack" / "x.o").read_bytes() == b"x"


@pytest.mark.parametrize("what", ["a FIFO", "a directory", "a device", "nothing"])
def test_what_is_no_file_is_refused_at_once(what: str, cache: CompileCache, tmp_path: Path) -> None:
    file = tmp_path / "file"
    if what == "a FIFO":
        os.mkfifo(file)
    elif what == "a directory":
        file.mkdir()
    elif what == "a device":
        file = Path("/dev/zero")
    with pytest.raises(CacheError, match=f"--import {file}: "):
        cache_archive.import_(cache, file, None)


def test_an_export_over_the_bounds_is_told_then_not_later(cache: CompileCache, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sealed, "MOST_BYTES", 2)
    cache.add("choices.json", {"a": "sdpa"})
    with pytest.raises(CacheError, match="more than a cache can be"):
        cache_archive.export(cache, tmp_path / "cache.zip", KEY)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
