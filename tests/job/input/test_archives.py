"""Inputs that are packed read as what is in them; what is cut short or damaged is refused in a line."""

import gzip
import json
import os
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxcli.core.errors import InputError
from fluxcli.job.input.raw.lines import MAX_LINE
from fluxcli.job.input.read import PromptFile, job_name
from tests.job.input.conftest import images, take
from tests.job.input.test_formats import ROWS, every_suffix, prompts, scanned

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_AS_THE_PROGRAM = {zstd.CompressionParameter.checksum_flag: 1}
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: zstd.compress(data, options=_AS_THE_PROGRAM),
}
every_kind = pytest.mark.parametrize("kind", PACK)


@every_kind
@every_suffix
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_what_is_packed_reads_as_what_is_in_it(tmp_path: Path, kind, suffix, encoding, end) -> None:
    text = end.join(ROWS[suffix]).encode(encoding)
    plain, packed = tmp_path / f"in{suffix}", tmp_path / f"in{suffix}{kind}"
    plain.write_bytes(text)
    packed.write_bytes(PACK[kind](text))
    assert scanned(packed) == scanned(plain)
    assert [record.prompt for record in images(take(packed))] == ["Bänke 星", "b"]


@every_kind
def test_the_first_bytes_say_how_a_file_is_packed_and_its_name_what_it_holds(read, kind: str) -> None:
    text = b"prompt,id\na,x\nb,y\n"
    assert prompts(read(PACK[kind](text), ".csv")) == ["a", "b"]
    assert prompts(read(text, f".csv{kind}")) == ["a", "b"]
    assert prompts(read(PACK[kind](text), f".CSV{kind.upper()}")) == ["a", "b"]
    assert prompts(read(PACK[kind](text), ".bin", format="csv")) == ["a", "b"]
    with pytest.raises(InputError, match=rf"input{kind}: unknown kind of input.*\.gz or \.zst"):
        read(PACK[kind](text), kind)


@every_kind
def test_members_and_frames_one_after_another_are_one_text(read, kind: str) -> None:
    rows = [b'{"prompt": "a"}\n{"prom', b'pt": "b"}\n', b"", b'{"prompt": "c"}']
    assert prompts(read(b"".join(map(PACK[kind], rows)), f".jsonl{kind}")) == ["a", "b", "c"]


@every_kind
def test_bad_rows_are_told_by_their_lines(read, kind: str) -> None:
    records, failures = read(PACK[kind](b'{"prompt": "a"}\nnot json\n\n{"prompt": 7}\n'), f".jsonl{kind}")
    assert [(failure.line, failure.id) for failure in failures] == [(2, None), (4, "000002")]
    assert [record.line for record in records] == [1]


@every_kind
def test_many_rows_are_read_again_by_their_offsets(tmp_path: Path, kind: str) -> None:
    rows = [json.dumps({"prompt": f"{n} " + RANDOM.randbytes(200).hex(), "n": 2}) for n in range(2000)]
    path = tmp_path / f"in.jsonl{kind}"
    path.write_bytes(PACK[kind]("\n".join(rows).encode()))
    assert [json.dumps(row) for _, row in scanned(path)] == rows


RANDOM = random.Random(0)
ROW = b"".join(b'{"prompt": "%s"}\n' % RANDOM.randbytes(300).hex().encode() for _ in range(400))


def damaged(kind: str) -> dict[str, tuple[bytes, str]]:
    whole = PACK[kind](ROW)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    other = bytearray(whole)
    other[-1 if kind == ".zst" else -6] ^= 1
    return {
        "amid": (whole[: len(whole) // 2], "is cut short"),
        "after its head": (whole[:5], "is cut short"),
        "a byte before its end": (whole[:-1], "is cut short"),
        "a flipped byte": (bytes(flipped), "is no sound"),
        "its check sum": (bytes(other), "is no sound"),
        "something behind it": (whole + b"garbage", "is no sound"),
    }


@every_kind
@pytest.mark.parametrize("how", damaged(".gz"))
def test_what_is_cut_short_or_damaged_is_refused_in_one_line(tmp_path: Path, kind: str, how: str) -> None:
    data, says = damaged(kind)[how]
    path = tmp_path / f"in.jsonl{kind}"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"in\.jsonl{kind}: {says}") as refused:
        PromptFile(str(path))
    assert str(refused.value).isprintable()


@every_kind
def test_a_bomb_takes_neither_memory_nor_disk(tmp_path: Path, kind: str) -> None:
    """A line of 48 MiB among rows, packed to some KiB."""
    path = tmp_path / f"in.jsonl{kind}"
    with (gzip if kind == ".gz" else zstd).open(path, "wb") as file:
        file.write(b'{"prompt": "a"}\n')
        for _ in range(48):
            file.write(bytes(2**20))
        file.write(b'\n{"prompt": "b"}\n')
    tracemalloc.start()
    source = PromptFile(str(path))
    rows = list(source.scan())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    disk = os.fstat(source._bytes._file.fileno()).st_size  # type: ignore[union-attr, attr-defined]
    source.close()
    assert [isinstance(row.value, dict) for row in rows] == [True, False, True]
    assert peak < 3 * MAX_LINE and disk < 2**20


def test_a_frame_that_wants_gigabytes_for_its_window_is_refused(tmp_path: Path) -> None:
    """RFC 8878: magic, a header that names a window of 2 GiB, one raw block of one byte."""
    path = tmp_path / "in.txt.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([21 << 3]) + b"\x09\0\0" + b"a")
    with pytest.raises(InputError, match=r"in\.txt\.zst: is no sound zstd file: .*memory"):
        PromptFile(str(path))


def test_without_its_library_zstd_is_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression", "backports"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(zstd.compress(ROW))
    with pytest.raises(InputError, match=r"in\.jsonl\.zst: is zstd, .*fluxcli\[zstd\].*zstd -dc FILE \|"):
        PromptFile(str(path))


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b.jsonl.gz", "b"), ("b.v2.csv.ZST", "b.v2"), ("b.parquet", "b"), ("b.jsonl", "b")],
)
def test_a_job_is_named_for_its_input(path: str, name: Any) -> None:
    assert job_name(path) == name
