"""An image of a job, drawn again from its row alone."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import SMALL, copy_of
from tests.conftest import Result, read_rows, write_rows

ROWS = [
    {"id": "a", "prompt": "a red circle"},
    {"id": "b", "prompt": "a blue square", "seed": 7, "steps": 9},
    {"id": "c", "prompt": "a green star", "negative_prompt": "", "true_cfg_scale": 3},
    {"id": "d", "prompt": "a yellow ring", "num_images": 2},
]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By how it was made, all in batches of several."""
    from click.testing import CliRunner

    from fluxcli.cli.main import cli

    folder = tmp_path_factory.mktemp("jobs")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    masked = ("--step-cache", "101101101", "--steps", 9, "--limit", 2)
    more = {"plain": (), "jpg": ("--format", "jpg"), "masked": masked}
    for name, options in more.items():
        words = ["batch", rows, "-o", folder / name, *SMALL, *options, "--device", "cpu"]
        done = CliRunner().invoke(cli, [str(word) for word in words])
        assert done.exit_code == 0, done.stderr
    return {name: folder / name for name in more}


@pytest.mark.parametrize(("job", "id"), [*(("plain", id) for id in ("a", "b", "c", "d-1")), ("masked", "b")])
def test_a_row_alone_makes_its_image_again(inside: Callable[..., Result], jobs, job: str, id: str) -> None:
    result = inside("replay", jobs[job], id, "--json", "--save", "again.png")
    told = json.loads(result.stdout)
    there, again = Image.open(jobs[job] / "images" / f"{id}.png"), Image.open(Path.cwd() / "again.png")
    off = np.abs(np.asarray(there, dtype=int) - np.asarray(again))
    assert off.max() <= 1  # its batch held others
    assert result.returncode == (0 if told["same"] else 3)
    assert told["same"] == "bytes" or told["grey_levels"]["most"] == off.max()


def test_bytes_pixels_and_neither_are_told_apart(inside: Callable[..., Result], jobs, tmp_path: Path) -> None:
    job = copy_of(jobs["plain"], tmp_path / "job")
    file = job / "images" / "b.png"
    drawn = tmp_path / "again.png"
    inside("replay", job, "b", "--save", drawn)
    manifest = job / "manifest.jsonl"
    rows = read_rows(manifest)

    def put(data: bytes, sha256: str) -> None:
        file.write_bytes(data)
        write_rows(manifest, [{**row, "sha256": sha256} if row["id"] == "b" else row for row in rows])

    exact = hashlib.sha256(drawn.read_bytes()).hexdigest()
    put(drawn.read_bytes(), exact)
    result = inside("replay", job, "b")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (0, "b: the same file, byte by byte")
    file.unlink()
    assert inside("replay", job, "b").stderr.splitlines()[-1].endswith("; the job's own is gone or another by now")
    with Image.open(drawn) as image:
        image.save(file, optimize=True)
    put(file.read_bytes(), hashlib.sha256(file.read_bytes()).hexdigest())
    result = inside("replay", job, "b")
    assert result.returncode == 0
    assert result.stderr.splitlines()[-1] == "b: the same pixels; the file's other bytes differ"
    write_rows(manifest, [{**row, "seed": 8} if row["id"] == "b" else row for row in rows])
    result = inside("replay", job, "b", "--json")
    assert result.returncode == 3 and "b: other pixels: " in result.stderr
    assert json.loads(result.stdout)["grey_levels"]["most"] > 1 and json.loads(result.stdout)["psnr"] > 0


def test_a_lossy_job_is_compared_as_it_decodes(inside: Callable[..., Result], jobs) -> None:
    told = json.loads(inside("replay", jobs["jpg"], "a", "--json").stdout)
    assert told["same"] or told["grey_levels"]["most"] <= 8
    assert told["file_is_the_rows"]


def test_what_cannot_be_drawn_again_is_told_before_a_model_is_loaded(
    inside: Callable[..., Result], jobs, tmp_path: Path, pipeline
) -> None:
    from tests.pipelines import DEV

    def refused(*words: object) -> str:
        result = inside("replay", *words)
        assert result.returncode == 1 and "loading" not in result.stderr
        return result.stderr

    assert "has no image with the id x" in refused(jobs["plain"], "x")
    (tmp_path / "none").mkdir()
    assert "none" in refused(tmp_path / "none", "a")
    assert "replay draws with the same weights only" in refused(jobs["plain"], "a", "-m", pipeline(DEV))
    (tmp_path / "there.png").touch()
    assert "exists already" in refused(jobs["plain"], "a", "--save", tmp_path / "there.png")
    broken = copy_of(jobs["plain"], tmp_path / "broken")
    identity = json.loads((broken / "job.json").read_text())
    identity["options"]["format"] = "exe"
    (broken / "job.json").write_text(json.dumps(identity))
    assert "names no format of images" in refused(broken, "a")
    identity["options"] |= {"format": "png", "dtype": "int4"}
    (broken / "job.json").write_text(json.dumps(identity))
    assert "options.dtype is none of" in refused(broken, "a")


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({"text_length": 10**12}, "text_length must be 1 to 512"),
        ({"width": 65536}, "multiples of 16 from 64 to 4096"),
        ({"height": 65}, "multiples of 16 from 64 to 4096"),
        ({"num_inference_steps": 10**6}, "at most 1000"),
        ({"step_cache": "10", "evaluated_steps": 1}, "no mask of its steps"),
        ({"quantization": "int1"}, "quantization is none of"),
    ],
)
def test_a_row_that_fluxcli_never_wrote_is_not_drawn(
    lie: dict[str, object], told: str, inside: Callable[..., Result], jobs, tmp_path: Path
) -> None:
    job = copy_of(jobs["plain"], tmp_path / "job")
    rows = read_rows(job / "manifest.jsonl")
    write_rows(job / "manifest.jsonl", [{**row, **lie} for row in rows])
    result = inside("replay", job, "a")
    assert result.returncode == 1 and "loading" not in result.stderr
    assert told in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_an_adapter_that_is_another_by_now_is_refused(inside: Callable[..., Result], tmp_path: Path) -> None:
    from tests.adapters import FORMATS, Maker
    from tests.pipelines import TINY

    path = FORMATS["kohya"](Maker(TINY, 1)).write(tmp_path / "style.safetensors")
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "a red circle", "lora": str(path)}])
    assert inside("batch", rows, "-o", "job", *SMALL).returncode == 0
    assert inside("replay", "job", "a").returncode == 0
    FORMATS["kohya"](Maker(TINY, 2)).write(path)
    result = inside("replay", "job", "a")
    assert result.returncode == 1 and "is another adapter than the image was made with" in result.stderr
