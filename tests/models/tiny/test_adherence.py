"""fluxcli's own pictures of unseen prompts, from the command line to the judge, at every setting that may cost quality.

The floors are for thirty pictures; jobs/tiny/tests/test_model.py holds more of them to the aims.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from jobs.tiny.evaluate import cases, score
from tests.conftest import read_rows, write_rows

FLOORS = {"single": 0.93, "pair": 0.9}
BUCKETS = "64,128,256,512"


def right(fluxcli: Callable, tmp_path: Path, kind: str, count: int, *options: object) -> dict:
    """The judge's score of what `fluxcli batch` makes of `count` unseen prompts, by the pictures in its manifest."""
    wanted = cases(kind, count)
    rows = [{"id": f"{i}", "prompt": case.prompt, "seed": case.seed} for i, case in enumerate(wanted)]
    write_rows(tmp_path / "unseen.jsonl", rows)
    result = fluxcli("batch", "unseen.jsonl", "-o", "out", "-m", "tiny", "--device", "cpu", *options)
    assert result.returncode == 0, result.stderr
    files = {row["id"]: row["file_name"] for row in read_rows(tmp_path / "out" / "manifest.jsonl")}
    pictures = [Image.open(tmp_path / "out" / files[row["id"]]) for row in rows]
    return score(pictures, wanted)


@pytest.mark.parametrize("kind", FLOORS)
def test_unseen_prompts(fluxcli: Callable, tmp_path: Path, kind: str) -> None:
    result = right(fluxcli, tmp_path, kind, 30)
    assert result["right"] >= FLOORS[kind], result


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLOORS)
@pytest.mark.parametrize(
    ("text_lengths", "batch_size", "dtype"),
    [
        ("64", 8, "float32"),
        ("128", 8, "float32"),
        ("256", 8, "float32"),
        ("512", 8, "float32"),
        (BUCKETS, 1, "float32"),
        (BUCKETS, 32, "float32"),
        (BUCKETS, 8, "bfloat16"),
    ],
)
def test_no_setting_costs_adherence(
    fluxcli: Callable, tmp_path: Path, kind: str, text_lengths: str, batch_size: int, dtype: str
) -> None:
    options = ("--text-lengths", text_lengths, "--batch-size", batch_size, "--dtype", dtype)
    result = right(fluxcli, tmp_path, kind, 60, *options)
    assert result["right"] >= FLOORS[kind], result
