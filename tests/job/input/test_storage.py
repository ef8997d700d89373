"""A temporary file's packed parts read as the bytes that went in, at any position."""

import random
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fluxcli.job.input.raw import storage
from fluxcli.job.input.raw.storage import BLOCK, Packed, Plain, blocks_in

PART = storage._PART
WHOLE = random.Random(0).randbytes(PART // 2) * 5 + b"the end"
_cuts = st.lists(st.integers(0, len(WHOLE)), max_size=6)
_place = st.one_of(st.integers(0, len(WHOLE) + 3), st.sampled_from([PART - 1, PART, PART + 1, 2 * PART, len(WHOLE)]))


@settings(max_examples=60, deadline=None)
@given(_cuts, st.lists(st.tuples(_place, st.integers(1, 3 * PART)), min_size=1, max_size=5))
def test_any_range_of_what_came_in_any_blocks(cuts: list[int], reads: list[tuple[int, int]]) -> None:
    ends = [0, *sorted(cuts), len(WHOLE)]
    packed = Packed(WHOLE[start:end] for start, end in pairwise(ends))
    for offset, size in reads:
        assert packed.pread(size, offset) == WHOLE[offset : offset + size]
    assert b"".join(blocks_in(packed)) == WHOLE
    packed.close()


def test_nothing_is_an_empty_file() -> None:
    packed = Packed([])
    assert packed.pread(10, 0) == packed.pread(10, 5) == b""
    packed.close()


def test_a_plain_file_reads_alike(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(WHOLE)
    plain = Plain((tmp_path / "x").open("rb"))
    assert plain.pread(7, 3) == WHOLE[3:10] and plain.pread(7, len(WHOLE)) == b""
    assert b"".join(blocks_in(plain)) == WHOLE and len(WHOLE) < BLOCK
    plain.close()
