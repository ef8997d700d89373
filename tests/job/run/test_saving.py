"""One image's saving never ends the job: what is not the disk's fault fails that row, and its neighbours are kept."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxcli.core.config import ImageFormat
from fluxcli.core.errors import JobError
from fluxcli.job.output import images
from fluxcli.job.output.store import JobStore
from fluxcli.job.report.verify import verify
from tests.conftest import read_rows, write_rows
from tests.job import harness


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return harness.write_input(tmp_path / "rows.jsonl")


ERRORS = [
    ValueError("EXIF data is too long\nsecond line"),
    OSError("encoder error -2 when writing image file"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_image_that_cannot_be_encoded_is_a_failed_row(
    error: Exception, rows: Path, tmp_path: Path, monkeypatch
) -> None:
    real = images.encode

    def encode(pixels: Any, format: ImageFormat, record: Any, model: str) -> bytes:
        if record.id == "p5":
            raise error
        return real(pixels, format, record, model)

    directory = tmp_path / "job"
    monkeypatch.setattr(images, "encode", encode)
    assert harness.run(rows, directory) == 3
    (failure,) = read_rows(directory / "failures.jsonl")
    assert (failure["id"], failure["line"], failure["attempt"]) == ("p5", 6, 1)
    assert failure["error"]["type"] == "encode_error"
    assert failure["error"]["message"] == (str(error) or "MemoryError").splitlines()[0]
    assert set(harness.essence(directory)) == {f"p{n}" for n in range(harness.ROWS)} - {"p5"}
    assert not any("p5" in path.name for path in (directory / "images").iterdir())
    monkeypatch.setattr(images, "encode", real)
    again = harness.SeedEngine()
    assert harness.run(rows, directory, again) == 0
    assert again.batches == [["p5"]]
    assert not verify(directory).problems


def test_an_image_that_cannot_be_written_for_its_own_sake_is_a_failed_row(
    rows: Path, tmp_path: Path, monkeypatch
) -> None:
    real = JobStore.write

    def write(self: JobStore, file_name: str, data: bytes) -> Any:
        if Path(file_name).stem == "p5":
            raise ValueError("embedded null byte")
        return real(self, file_name, data)

    monkeypatch.setattr(JobStore, "write", write)
    assert harness.run(rows, tmp_path / "job") == 3
    (failure,) = read_rows(tmp_path / "job" / "failures.jsonl")
    assert (failure["id"], failure["error"]["type"]) == ("p5", "encode_error")
    assert len(harness.essence(tmp_path / "job")) == harness.ROWS - 1


def test_a_disk_that_cannot_be_written_ends_the_run(rows: Path, tmp_path: Path, monkeypatch) -> None:
    real = os.open

    def full(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith(".p5.png"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(JobError, match="No space left"):
        harness.run(rows, tmp_path / "job")
    assert not (tmp_path / "job" / "failures.jsonl").exists()


def test_images_carry_the_last_part_of_a_local_models_path(rows: Path, tmp_path: Path) -> None:
    job = harness.job(rows, tmp_path / "job")
    job = replace(job, checkpoint=replace(job.checkpoint, name="/home/someone/models/mine"))
    job.run(lambda shapes: harness.SeedEngine(), {"device": "seed", "versions": {}}, lambda text: None)
    text = Image.open(tmp_path / "job" / "images" / "p1.png").info["parameters"]
    assert text.endswith(", Model: mine")
    assert json.loads((tmp_path / "job" / "job.json").read_text())["model"]["name"] == "/home/someone/models/mine"


def test_a_prompt_too_long_for_exif_costs_no_image_and_its_row_says_so(tmp_path: Path) -> None:
    prompts = {f"p{n}": f"image {n}" for n in range(8)} | {
        "long": "word " * 7200,
        "emoji": "\N{GRINNING FACE}" * 17_000,
    }
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": id, "prompt": prompt} for id, prompt in prompts.items()])
    assert harness.run(rows, tmp_path / "job", image=ImageFormat("jpg")) == 0
    made = harness.essence(tmp_path / "job")
    assert {id: row["prompt"] for id, row in made.items()} == prompts
    assert {id for id, row in made.items() if row.get("comment_truncated")} == {"long", "emoji"}
    assert all("comment_truncated" not in made[f"p{n}"] for n in range(8))
    for id in prompts:
        comment = Image.open(tmp_path / "job" / made[id]["file_name"]).getexif().get_ifd(0x8769)[0x9286][8:]
        assert f"\nSteps: 2, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: {made[id]['seed']}" in (
            comment.decode("utf-16-be")
        )
    assert not verify(tmp_path / "job").problems
    assert harness.run(rows, tmp_path / "job", image=ImageFormat("jpg")) == 0  # as it was before: resumes
