"""Heads of GGUF files: read as the format has them, and held to the file whatever they claim."""

import struct
from pathlib import Path

import pytest

from fluxcli.core.errors import ModelError
from fluxcli.models import gguf
from fluxcli.models.checkpoints import resolve
from fluxcli.models.headers import read_header
from tests import single_files
from tests.single_files import bfl, tensors


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def tensor(name: bytes | str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    tensors: bytes = b"", count: int = 0, settings: bytes = b"", setting_count: int = 0, version: int = 3
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, count, setting_count) + settings + tensors
    return head + bytes(-len(head) % 32)


ONE = tensor("a", (4, 2))
ALIGNED = text("general.alignment") + struct.pack("<II", 4, 64)
WORDS = text("words") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yy")

BAD: dict[str, tuple[bytes, str]] = {
    "no GGUF": (b"GGML" + bytes(100), r"no GGUF header: another kind of file"),
    "an old version": (file(version=1), r"version 1"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"version 50331648"),
    "nothing": (b"", r"it ends within its header; download it again"),
    "cut short": (file(ONE, 1)[:40], r"it ends within its header; download it again"),
    "2^60 tensors": (file(count=2**60), r"1152921504606846976 tensors"),
    "2^60 settings": (file(setting_count=2**60), r"it ends within its header"),
    "a name of 2^60 bytes": (file(struct.pack("<Q", 2**60), 1), r"it ends within its header"),
    "a list of 2^60 numbers": (
        file(settings=text("x") + struct.pack("<IIQ", 9, 4, 2**60), setting_count=1),
        r"it ends within its header",
    ),
    "a list of 2^60 texts": (
        file(settings=text("x") + struct.pack("<IIQ", 9, 8, 2**60), setting_count=1),
        r"it ends within its header",
    ),
    "a list of lists": (file(settings=text("x") + struct.pack("<IIQ", 9, 9, 1), setting_count=1), r"of type 9"),
    "a setting of no type": (file(settings=text("x") + struct.pack("<I", 77), setting_count=1), r"of type 77"),
    "a name that is no text": (file(tensor(b"\xff\xfe", (4, 2)), 1) + bytes(32), r"no GGUF header"),
    "nine dimensions": (file(tensor("a", (1,) * 9), 1), r"a has 9 dimensions"),
    "a tensor of 2^120 values": (file(tensor("a", (2**60, 2**60)), 1), r"the download broke off"),
    "a tensor beyond the end": (file(tensor("a", (4, 2), offset=2**50), 1), r"the download broke off"),
    "a tensor that lies askew": (file(tensor("a", (4, 2), offset=7), 1) + bytes(64), r"a lies askew"),
    "half a block": (file(tensor("a", (48, 2), 8), 1) + bytes(640), r"a has rows of 48 in blocks of 32"),
    "no alignment": (
        file(settings=text("general.alignment") + struct.pack("<II", 4, 0), setting_count=1),
        r"an alignment of 0",
    ),
    "an alignment of text": (
        file(settings=text("general.alignment") + struct.pack("<I", 8) + text("x"), setting_count=1),
        r"an alignment of x",
    ),
    "control characters": (file(tensor("\x1b]0;", (48, 2), 8), 1), r"no GGUF header: \\x1b\]0; has rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_head_that_lies_is_refused_in_a_line(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message) as refused:
        read_header(path)
    assert str(refused.value).startswith(f"{path}: cannot be read: ")
    assert len(str(refused.value).splitlines()) == 1 and str(refused.value).isprintable()


def test_settings_are_passed_over_and_an_alignment_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    head = file(ONE + tensor("b", (32, 3), 8, 64), 2, WORDS + ALIGNED, 2)
    base = len(head.rstrip(b"\0")) // 64 * 64 + 64
    path.write_bytes(head + bytes(512))
    header = read_header(path)
    shapes = {entry.name: (entry.dtype, entry.shape, entry.end - entry.start) for entry in header.entries}
    assert shapes == {"a": ("F32", (2, 4), 32), "b": ("Q8_0", (3, 32), 102)}
    assert {entry.start % 64 for entry in header.entries} == {0}
    assert header.entries[1].start - header.entries[0].start == 64 and base % 64 == 0


def test_the_types_are_as_large_as_the_package_says() -> None:
    of = pytest.importorskip("gguf")
    for number, (name, values, bytes_) in gguf.TYPES.items():
        kind = of.GGMLQuantizationType(number)
        assert (kind.name, of.GGML_QUANT_SIZES[kind]) == (name, (values, bytes_))


def test_another_type_is_named(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = single_files.gguf(tmp_path / "x.gguf", bfl(tensors(model, "transformer")), "F16")
    data = path.read_bytes()
    name = b"img_in.weight"
    place = data.index(name) + len(name) + 4 + 16
    path.write_bytes(data[:place] + struct.pack("<I", 16) + data[place + 4 :])
    with pytest.raises(ModelError, match=r"img_in\.weight is of GGUF's type 16, which fluxcli does not read"):
        resolve(str(model), files={"transformer": path})


def test_without_the_package_it_is_told_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file(ONE, 1) + bytes(32))
    monkeypatch.setattr("fluxcli.models.gguf.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"x\.gguf: to read GGUF files: pip install 'fluxcli\[gguf\]'"):
        resolve(str(model), files={"transformer": path})
