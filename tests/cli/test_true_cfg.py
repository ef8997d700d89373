"""True CFG from outside: rows and options, the plan and its cost, the manifest, workers, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxcli.job.report.verify import verify
from tests.cli.conftest import SMALL
from tests.conftest import Result, read_rows, write_rows

Command = Callable[..., Result]
ROWS: list[dict[str, Any]] = [
    {"id": "plain", "prompt": "a red circle", "seed": 1},
    {"id": "own", "prompt": "a red circle", "seed": 1, "negative_prompt": 'a "blue" square', "true_cfg_scale": 4},
    {"id": "empty", "prompt": "a red circle", "seed": 1, "negative_prompt": "", "true_cfg_scale": 4},
    {"id": "alone", "prompt": "a red circle", "seed": 1, "true_cfg_scale": 4},
    {"id": "bad", "prompt": "a red circle", "negative_prompt": "x"},
]


def image(directory: Path, id: str) -> np.ndarray:
    return np.asarray(Image.open(directory / "images" / f"{id}.png"), dtype=int)


def by_id(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_rows(directory / "manifest.jsonl")}


@pytest.fixture
def batch(inside: Command, tmp_path: Path) -> Command:
    write_rows(tmp_path / "in.jsonl", ROWS)
    return lambda *words: inside("batch", "in.jsonl", *SMALL, "--steps", 4, *words)


def test_rows_have_it_each_for_itself(batch: Command, tmp_path: Path) -> None:
    done = batch("-o", "out")
    assert done.returncode == 3, done.stderr
    assert "rows ask for what fluxcli does not do: true_cfg_scale (no negative_prompt) (1 row)" in done.stderr
    assert "line 5: negative_prompt needs true_cfg_scale above 1; without it, it would change nothing" in done.stderr
    out = tmp_path / "out"
    rows = by_id(out)
    assert {id: (row.get("negative_prompt"), row.get("true_cfg_scale")) for id, row in rows.items()} == {
        "plain": (None, None),
        "own": ('a "blue" square', 4.0),
        "empty": ("", 4.0),
        "alone": (None, None),
    }
    assert "meta" not in rows["own"] or not rows["own"]["meta"]
    assert (image(out, "plain") == image(out, "alone")).all()
    for one, other in (("plain", "own"), ("plain", "empty"), ("own", "empty")):
        assert np.abs(image(out, one) - image(out, other)).mean() > 0.5
    with Image.open(out / "images" / "own.png") as picture:
        told = picture.info["parameters"]
    assert told.startswith('a red circle\nNegative prompt: a "blue" square\nSteps: 4, Sampler: Euler, CFG scale: 4,')
    assert not verify(out).problems


def test_a_later_start_knows_its_rows_and_tells_changed_ones(batch: Command, tmp_path: Path) -> None:
    assert batch("-o", "out", "--limit", 3).returncode == 0
    again = batch("-o", "out", "--limit", 3)
    assert again.returncode == 0 and "nothing to do: 3 images were done before" in again.stderr
    write_rows(tmp_path / "in.jsonl", [ROWS[0], ROWS[1] | {"true_cfg_scale": 5}, ROWS[2] | {"negative_prompt": "x"}])
    changed = batch("-o", "out")
    assert changed.returncode == 3
    assert [row["id"] for row in read_rows(tmp_path / "out" / "failures.jsonl")] == ["own", "empty"]


def test_the_dry_run_tells_its_cost(batch: Command) -> None:
    told = batch("-o", "out", "--dry-run")
    assert "4, true CFG" in told.stderr
    assert "true CFG: 2 images take two rows of the denoiser each, which makes its work 50.0% more" in told.stderr
    assert "2 x 64x64/64 true CFG" in told.stderr
    data = batch("-o", "out", "--dry-run", "--json").json
    assert data["true_cfg"] == {"images": 2, "more": 0.5}
    assert [(group["images"], group.get("true_cfg")) for group in data["groups"]] == [(2, True), (2, None)]
    assert [shape.get("branches") for shape in data["shapes"]] == [2, None]
    assert "true_cfg" not in batch("-o", "out", "--dry-run", "--json", "--limit", 1).json


def test_options_are_for_rows_without(batch: Command, tmp_path: Path) -> None:
    done = batch("-o", "out", "--limit", 3, "--negative-prompt", 'a "blue" square', "--true-cfg-scale", 4)
    assert done.returncode == 0, done.stderr
    rows = by_id(tmp_path / "out")
    assert rows["plain"]["negative_prompt"] == rows["own"]["negative_prompt"] and rows["empty"]["negative_prompt"] == ""
    assert np.abs(image(tmp_path / "out", "plain") - image(tmp_path / "out", "own")).max() <= 1
    other = batch("-o", "out", "--limit", 3)
    assert other.returncode == 1
    assert '--negative-prompt was a "blue" square, now None; --true-cfg-scale was 4.0, now 1.0' in other.stderr


def test_workers_and_the_step_cache_draw_the_same(batch: Command, tmp_path: Path) -> None:
    cached = ("--limit", 3, "--step-cache", "1101")
    for words in (("-o", "one"), ("-o", "two", "--workers", 1), ("-o", "alone", "--batch-size", 1)):
        done = batch(*words, *cached)
        assert done.returncode == 0, done.stderr
    assert batch("-o", "full", "--limit", 3).returncode == 0
    for id in ("plain", "own", "empty"):
        for other in ("two", "alone"):
            assert np.abs(image(tmp_path / "one", id) - image(tmp_path / other, id)).max() <= 1
        assert np.abs(image(tmp_path / "one", id) - image(tmp_path / "full", id)).max() > 1
    assert by_id(tmp_path / "two")["own"]["true_cfg_scale"] == 4.0
    more = [*ROWS[:3], {"id": "more", "prompt": "x", "negative_prompt": "", "true_cfg_scale": 2}]
    write_rows(tmp_path / "in.jsonl", [*more, {"id": "other", "prompt": "y"}])
    told = batch("-o", "full", "--dry-run", "--json").json["forecast"]
    assert told["images"] == 2  # by shapes of their own kind


def test_gen_has_it(inside: Command, batch: Command, tmp_path: Path) -> None:
    assert batch("-o", "out", "--limit", 2).returncode == 0
    words = ("--steps", 4, "--seed", 1, "--negative-prompt", 'a "blue" square', "--true-cfg-scale", 4)
    done = inside("gen", "a red circle", *SMALL, *words, "-o", "x.png", "--json")
    assert done.returncode == 0, done.stderr
    assert done.json["images"][0]["true_cfg_scale"] == 4.0
    made = np.asarray(Image.open(tmp_path / "x.png"), dtype=int)
    assert np.abs(made - image(tmp_path / "out", "own")).max() <= 1


def test_what_would_change_nothing_is_refused(inside: Command, batch: Command) -> None:
    for command in (("batch", "in.jsonl"), ("gen", "x")):
        refused = inside(*command, *SMALL, "--negative-prompt", "ugly")
        assert refused.returncode == 2
        assert "--negative-prompt needs --true-cfg-scale above 1; without it, it would change nothing" in refused.stderr
    strict = batch("-o", "out", "--limit", 4, "--strict")
    assert strict.returncode == 1 and "true_cfg_scale (no negative_prompt)" in strict.stderr


def test_warmup_makes_its_shapes_ready(inside: Command, batch: Command) -> None:
    sizes = inside(
        "warmup",
        *SMALL[:2],
        "--size",
        "64x64",
        "--batch-size",
        2,
        "--text-lengths",
        64,
        "--true-cfg-scale",
        2,
        "--json",
    )
    assert sizes.returncode == 0, sizes.stderr
    assert [shape.get("branches") for shape in sizes.json["shapes"]] == [2]
    assert "2 x 64x64, text 64, true CFG" in sizes.stderr
    rows = inside("warmup", "in.jsonl", *SMALL, "--json")
    assert [(shape["batch_size"], shape.get("branches")) for shape in rows.json["shapes"]] == [(2, 2), (2, None)]


def test_calibrate_measures_both_branches(inside: Command, batch: Command) -> None:
    done = inside("calibrate", "in.jsonl", *SMALL, "--steps", 4, "--limit", 3, "-o", "ratios.json", "--json")
    assert done.returncode == 0, done.stderr
    assert "1 x 64x64, text 64, true CFG" in done.stderr and len(done.json["ratios"]) == 4
