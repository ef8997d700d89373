"""`fluxcli warmup`: the shapes of an input, or of given sizes, made ready and reported."""

import time
from pathlib import Path

import pytest

from tests.cli.conftest import SMALL, files
from tests.conftest import write_rows


def test_warmup_covers_the_shapes_of_an_input_and_makes_no_images(command, inside, tmp_path: Path) -> None:
    rows = [{"prompt": "a"}] * 5 + [{"prompt": "a red circle " * 40, "width": 96}, {"prompt": ""}]
    write_rows(tmp_path / "in.jsonl", rows)
    options = ("in.jsonl", *SMALL, "--batch-size", 4, "--json")
    result = command("warmup", *options, cwd=tmp_path, env={"FLUXCLI_CACHE": str(tmp_path / "cache")})
    assert result.returncode == 0, result.stderr
    dry = inside("batch", "in.jsonl", *SMALL, "--batch-size", 4, "--dry-run", "--json")
    shapes = [
        {key: row[key] for key in ("batch_size", "height", "width", "text_length")} for row in result.json["shapes"]
    ]
    assert shapes == dry.json["shapes"]
    assert all(row["seconds"] >= 0 for row in result.json["shapes"])
    assert result.json["cache"] == str(tmp_path / "cache")
    assert {name for name in files(tmp_path) if not name.startswith("cache/")} == {"in.jsonl"}


def test_warmup_takes_several_sizes_and_reports_each_on_stderr(command, tmp_path: Path) -> None:
    options = ("--size", "64x96", "--size", "128x64", "--batch-size", 2, "--text-lengths", "64,128", "-m", "tiny")
    result = command("warmup", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    for size in ("64x96", "128x64"):
        assert len([line for line in result.stderr.splitlines() if size in line]) == 2
    assert not files(tmp_path)


@pytest.mark.parametrize("options", [("--size", "64"), ("--size", "64x100"), ("in.jsonl", "--size", "64x64")])
def test_sizes_that_cannot_be_meant_are_wrong_usage(inside, tmp_path: Path, options: tuple[str, ...]) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    result = inside("warmup", *options, "-m", "tiny")
    assert result.returncode == 2
    assert "--size" in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.slow
def test_what_was_warmed_up_is_compiled_once_and_comes_from_the_cache_the_next_time(command, tmp_path: Path) -> None:
    options = ("-m", "tiny", "--compile", "--size", "64x64", "--batch-size", 1, "--text-lengths", 64, "--json")
    environment = {"FLUXCLI_CACHE": str(tmp_path / "cache")}
    states = []
    for _ in range(2):
        start = time.perf_counter()
        result = command("warmup", *options, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        states.append([shape["state"] for shape in result.json["shapes"]])
        assert result.json["seconds"] <= time.perf_counter() - start
    assert states == [["cold"], ["cached"]]
    assert any((tmp_path / "cache").rglob("*"))
