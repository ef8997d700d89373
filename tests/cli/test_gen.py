"""`fluxcli gen`: one prompt, image files, one path per line."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import SMALL, files
from tests.conftest import Result, read_rows, write_rows

PROMPT = "a red circle, 星"


class Made(NamedTuple):
    home: Path
    result: Result

    @property
    def paths(self) -> list[Path]:
        return [self.home / line for line in self.result.stdout.splitlines()]


@pytest.fixture(scope="module")
def three(command, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Three images in the working directory, twice: the second time nothing may be overwritten."""
    home = tmp_path_factory.mktemp("three")
    return Made(home, command("gen", PROMPT, "-n", 3, "--seed", 5, *SMALL, cwd=home))


def test_gen_prints_one_path_per_line_and_makes_those_files_only(three: Made) -> None:
    assert three.result.returncode == 0, three.result.stderr
    assert len(three.paths) == 3
    assert {path.name for path in three.paths} == set(files(three.home))


def test_what_is_for_people_goes_to_stderr(three: Made) -> None:
    assert "Traceback" not in three.result.stderr
    assert not set(three.result.stdout.splitlines()) & set(three.result.stderr.splitlines())


def test_the_seeds_count_up_and_the_settings_are_inside(three: Made) -> None:
    for seed, path in enumerate(three.paths, start=5):
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", (64, 64))
            assert image.info["parameters"].startswith(f"{PROMPT}\n")
            assert f"Seed: {seed}," in image.info["parameters"]
    pictures = [np.asarray(Image.open(path)).astype(int) for path in three.paths]
    assert (pictures[0] != pictures[1]).any()


def test_an_image_is_the_one_that_a_batch_makes_of_the_same_row(inside, three: Made, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": PROMPT, "seed": 6}])
    assert inside("batch", "in.jsonl", "-o", "out", *SMALL).returncode == 0
    (row,) = read_rows(tmp_path / "out" / "manifest.jsonl")
    ours, theirs = (
        np.asarray(Image.open(path)).astype(int) for path in (three.paths[1], tmp_path / "out" / row["file_name"])
    )
    assert np.abs(ours - theirs).max() <= 1


def test_gen_again_overwrites_nothing(inside, three: Made) -> None:
    before = files(three.home)
    result = inside("gen", PROMPT, "--seed", 5, *SMALL, "--json", "--format", "webp", "-o", "new/place", cwd=three.home)
    assert result.returncode == 0, result.stderr
    again = inside("gen", PROMPT, "--seed", 5, *SMALL, cwd=three.home)
    assert again.returncode == 0, again.stderr
    after = files(three.home)
    assert {name: after[name] for name in before} == before
    (image,) = result.json["images"]
    with Image.open(three.home / image["file_name"]) as picture:
        assert picture.format == "WEBP"
    assert Path(image["file_name"]).parent == Path("new/place")
    expected = {"prompt": PROMPT, "seed": 5, "width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": 3.5}
    assert image.items() >= expected.items()
    assert result.json["model"] == "tiny"
    assert set(after) - set(before) == {image["file_name"], again.stdout.strip()}


def test_a_file_name_as_output_is_that_file_in_its_format(command, inside, tmp_path: Path) -> None:
    long = "a red circle beside a blue square " * 200
    result = command("gen", long, "-o", "sub/cat.jpg", *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "sub/cat.jpg\n"
    with Image.open(tmp_path / "sub" / "cat.jpg") as image:
        assert image.format == "JPEG"
    assert "512" in result.stderr, "a prompt that is cut is told to the user"
    before = files(tmp_path)
    refused = inside("gen", "another", "-o", "sub/cat.jpg", *SMALL)
    assert refused.returncode == 1
    assert "sub/cat.jpg" in refused.stderr
    assert refused.stdout == ""
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "cat.JPG",
        "cat.webp",
        "cat.jpeg",
    ],
)
def test_any_name_of_a_format_is_a_file_name(inside, tmp_path: Path, name: str) -> None:
    result = inside("gen", "a", "-o", name, *SMALL)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("output", "count"),
    [
        ("cat.png", 2),
        ("cat.bmp", 1),
    ],
)
def test_an_output_that_cannot_be_meant_is_wrong_usage(inside, tmp_path: Path, output: str, count: int) -> None:
    result = inside("gen", "a", "-n", count, "-o", output, *SMALL)
    assert not files(tmp_path)
    assert result.returncode == 2
    assert "-o" in result.stderr


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_wrong_usage(inside, tmp_path: Path, prompt: str) -> None:
    result = inside("gen", prompt, *SMALL)
    assert result.returncode == 2
    assert "prompt is empty" in result.stderr
    assert not files(tmp_path)
