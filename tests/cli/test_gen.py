"""`fluxcli gen`: one prompt, image files, one path per line."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from fluxcli.job.output import images
from tests.cli.conftest import SMALL, files
from tests.conftest import ENVIRONMENT, Result, read_rows, write_rows

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


# Prompts that the shell or the command line would take for something else


@pytest.mark.parametrize("prompt", ["-1 degrees outside", "-number nine", "-n degrees", "-1"])
def test_a_prompt_that_looks_like_an_option_is_told_how_to_be_one(inside, tmp_path: Path, prompt: str) -> None:
    result = inside("gen", prompt)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert 'gen -- "' in result.stderr
    assert not files(tmp_path)


def test_a_mistyped_option_is_no_prompt(inside) -> None:
    assert "gen --" not in inside("gen", "a", "--stepz", 3).stderr.replace("gen --help", "")


@pytest.mark.parametrize("environment", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_prompt_of_bytes_that_are_no_text_is_wrong_usage(tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fluxcli", "gen", b"caf\xe9", *map(str, SMALL)],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "UTF-8" in done.stderr and "0xe9" in done.stderr
    assert not files(tmp_path)


def test_a_prompt_that_is_text_is_read_in_any_locale(inside, tmp_path: Path) -> None:
    misread = "café".encode().decode("ascii", "surrogateescape")  # as Python does where the locale is ASCII
    result = inside("gen", misread, *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    assert result.json["images"][0]["prompt"] == "café"


# One image's saving costs no other image


@pytest.fixture
def broken_for(monkeypatch: pytest.MonkeyPatch):
    def break_(*seeds: int) -> None:
        real = images.encode

        def encode(pixels: Any, format: Any, record: Any, model: str) -> bytes:
            if record.seed in seeds:
                raise ValueError("it cannot be encoded")
            return real(pixels, format, record, model)

        monkeypatch.setattr(images, "encode", encode)

    return break_


def test_an_image_that_cannot_be_encoded_costs_no_other(inside, tmp_path: Path, broken_for) -> None:
    broken_for(1)
    result = inside("gen", "a", "-n", 3, *SMALL)
    assert result.returncode == 3
    assert result.stdout.split() == ["a-0.png", "a-2.png"]
    assert set(files(tmp_path)) == {"a-0.png", "a-2.png"}
    assert "seed 1: it cannot be encoded; nothing is written for it" in result.stderr.splitlines()
    told = inside("gen", "a", "-n", 3, *SMALL, "--json", "-o", "j")
    assert [image["seed"] for image in told.json["images"]] == [0, 2]
    assert told.json["failures"] == [{"seed": 1, "error": {"type": "encode_error", "message": "it cannot be encoded"}}]


def test_no_image_at_all_is_a_failure(inside, tmp_path: Path, broken_for) -> None:
    broken_for(0)
    result = inside("gen", "a", *SMALL)
    assert (result.returncode, result.stdout, files(tmp_path)) == (1, "", {})


def test_a_prompt_too_long_for_exif_is_made_and_told(inside, tmp_path: Path) -> None:
    result = inside("gen", "word " * 7200, *SMALL, "-o", "a.jpg", "--json")
    assert result.returncode == 0, result.stderr
    assert result.json["images"][0]["comment_truncated"] is True
    comment = Image.open(tmp_path / "a.jpg").getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")
    assert "…\nSteps: 1, " in comment


def test_a_local_model_is_known_by_its_last_part(inside, pipeline, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "my, model").symlink_to(pipeline())
    for name in ("private/my, model", "private/my, model/", tmp_path / "private" / "my, model"):
        result = inside("gen", "a", "-m", name, *SMALL[2:], "--json")
        assert result.returncode == 0, result.stderr
        (image,) = result.json["images"]
        text = Image.open(tmp_path / image["file_name"]).info["parameters"]
        assert text.endswith('Model: "my, model"')
        assert result.json["model"] == str(name)


def test_a_cpu_that_compiles_nothing_needs_no_cache(inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXCLI_CACHE", "/proc/none")
    assert inside("gen", "a", *SMALL).returncode == 0


# A disk that cannot be written


@pytest.mark.parametrize("output", ["out.png", "new/place"])
def test_a_full_disk_leaves_nothing_and_the_same_command_works_later(
    inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        result = inside("gen", "a", *SMALL, "-o", output)
    assert result.returncode == 1
    assert f"-o {output}: cannot be written: No space left on device" in result.stderr
    assert (result.stdout, files(tmp_path)) == ("", {})
    again = inside("gen", "a", *SMALL, "-o", output)
    assert again.returncode == 0, again.stderr
    assert set(files(tmp_path)) == {again.stdout.strip()}


def test_a_really_full_file_system(inside, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts")
    try:
        (disk / "fill").write_bytes(b"x" * 8192)
        result = inside("gen", "a", *SMALL, "-o", "disk/out.png")
        assert result.returncode == 1
        assert "No space left on device" in result.stderr
        assert set(files(disk)) == {"fill"}
        (disk / "fill").unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert inside("gen", "a", *SMALL, "-o", "disk/out.png").returncode == 0
        assert set(files(disk)) == {"out.png"}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_image_is_on_disk_for_sure_before_it_has_its_name(inside, tmp_path: Path, monkeypatch) -> None:
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("fsync")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    assert inside("gen", "a", *SMALL).returncode == 0
    assert calls == ["fsync", "replace", "fsync"]


# Signals


def test_a_stopped_gen_tells_what_it_wrote(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "fluxcli", "gen", "a", "-n", "500", "--batch-size", "1", *map(str, SMALL)]
    with subprocess.Popen(
        arguments, cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        first = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    told = (first + stdout).decode().split()
    assert set(told) == set(files(tmp_path)), "nothing torn, nothing untold"
    assert stderr.decode().splitlines()[-1] == f"stopped by SIGTERM; {len(told)} of 500 images are written"
    assert b"Traceback" not in stderr
    for name in told:
        Image.open(tmp_path / name).verify()


# Several prompts


def test_several_prompts_have_images_of_their_own_in_their_order(inside, tmp_path: Path) -> None:
    long = "a red circle beside a blue square " * 12
    result = inside("gen", "a red circle", long, "a blue square", "-n", 2, "--seed", 5, *SMALL, "--json", "-o", "made")
    assert result.returncode == 0, result.stderr
    made = result.json["images"]
    assert [(each["prompt"], each["seed"]) for each in made] == [
        (prompt, seed) for prompt in ("a red circle", long, "a blue square") for seed in (5, 6)
    ]
    assert made[2]["text_length"] > made[0]["text_length"] == made[4]["text_length"]
    alone = inside("gen", "a blue square", "--seed", 6, *SMALL, "-o", "alone.png")
    assert alone.returncode == 0, alone.stderr
    difference = np.asarray(Image.open(tmp_path / made[5]["file_name"])).astype(int) - np.asarray(
        Image.open(tmp_path / "alone.png")
    )
    assert abs(difference).max() <= 1


def test_prompts_come_from_standard_input_a_line_each(fluxcli) -> None:
    result = fluxcli("gen", "first", "-", *SMALL, "--json", stdin="a red circle\r\n\n星\n".encode())
    assert result.returncode == 0, result.stderr
    assert [each["prompt"] for each in result.json["images"]] == ["first", "a red circle", "星"]


@pytest.mark.parametrize(
    ("stdin", "told"),
    [(b"\n \n", "holds no prompt"), (b"\xff\n", "is not valid UTF-8"), (b"a\n" * 10_001, "fluxcli batch")],
)
def test_standard_input_that_is_no_prompts_is_wrong_usage(fluxcli, stdin: bytes, told: str) -> None:
    result = fluxcli("gen", "-", *SMALL, stdin=stdin)
    assert result.returncode == 2 and told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_several_prompts_need_a_directory(fluxcli) -> None:
    result = fluxcli("gen", "a", "b", *SMALL, "-o", "one.png")
    assert result.returncode == 2 and "2 images need a directory" in result.stderr
