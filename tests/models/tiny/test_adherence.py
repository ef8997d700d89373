"""fluxcli's own pictures of unseen prompts, from the command line to the judge, at every setting that may cost quality.

The floors are for thirty pictures; jobs/tiny/tests/test_model.py holds more of them to the aims.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

from jobs.tiny.evaluate import cases, score
from tests.conftest import read_rows, write_rows

FLOORS = {"single": 0.93, "pair": 0.9}
BUCKETS = "64,128,256,512"


def check(fluxcli: Callable, tmp_path: Path, kinds: Iterable[str], count: int, *options: object) -> None:
    """Scores what `fluxcli batch` makes of `count` unseen prompts of each kind, by the images in its manifest."""
    wanted = {f"{kind}-{i}": (kind, case) for kind in kinds for i, case in enumerate(cases(kind, count))}
    rows = [{"id": id, "prompt": case.prompt, "seed": case.seed} for id, (_, case) in wanted.items()]
    write_rows(tmp_path / "unseen.jsonl", rows)
    result = fluxcli("batch", "unseen.jsonl", "-o", "out", "-m", "tiny", "--device", "cpu", *options)
    assert result.returncode == 0, result.stderr
    files = {row["id"]: row["file_name"] for row in read_rows(tmp_path / "out" / "manifest.jsonl")}
    for kind in kinds:
        ids = [id for id, (its, _) in wanted.items() if its == kind]
        images = [Image.open(tmp_path / "out" / files[id]) for id in ids]
        found = score(images, [wanted[id][1] for id in ids])
        assert found["right"] >= FLOORS[kind], (kind, found)


def test_unseen_prompts(fluxcli: Callable, tmp_path: Path) -> None:
    check(fluxcli, tmp_path, FLOORS, 30)


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
    check(fluxcli, tmp_path, [kind], 60, *options)
