"""One job, one model: what a job's directory holds its model to, from one version to the next."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fluxcli.models.checkpoints import resolve
from tests.cli.conftest import SMALL
from tests.conftest import Result, read_rows, write_rows
from tests.models.conftest import WEIGHTS, edit, rewrite
from tests.pipelines import DEV
from tests.single_files import all_in_one

Command = Callable[..., Result]


@pytest.fixture
def batch(inside: Command, pipeline: Callable[..., Path], tmp_path: Path) -> Command:
    """Runs the job of two rows over a model that a test may change."""
    shutil.copytree(pipeline(DEV), tmp_path / "model")
    write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}])
    return lambda *options: inside("batch", "in.jsonl", "-o", "out", "-m", "model", *SMALL[2:], *options)


def with_old_fingerprint(directory: Path, model: Path) -> None:
    """Makes a job of the previous version's: it wrote the fingerprint of its day."""
    job = json.loads((directory / "job.json").read_text())
    edit(directory / "job.json", model={**job["model"], "fingerprint": resolve(str(model)).fingerprint("old")})


def test_a_job_of_the_previous_version_goes_on(batch: Command, tmp_path: Path) -> None:
    assert batch("--limit", 1).returncode == 0
    with_old_fingerprint(tmp_path / "out", tmp_path / "model")
    before = json.loads((tmp_path / "out" / "job.json").read_text())
    result = batch()
    assert result.returncode == 0, result.stderr
    assert [row["id"] for row in read_rows(tmp_path / "out" / "manifest.jsonl")] == ["a", "b"]
    after = json.loads((tmp_path / "out" / "job.json").read_text())
    assert {**after, "input": None} == {**before, "input": None}
    assert batch("--dry-run").returncode == 0


def test_a_job_of_the_previous_version_does_not_go_on_with_another_model(batch: Command, tmp_path: Path) -> None:
    assert batch("--limit", 1).returncode == 0
    with_old_fingerprint(tmp_path / "out", tmp_path / "model")
    edit(tmp_path / "model" / "vae" / "config.json", scaling_factor=0.5)
    result = batch()
    assert result.returncode == 1
    assert "--model was model (weights " in result.stderr


def test_a_job_does_not_go_on_after_an_adapter_was_merged_in_place(batch: Command, tmp_path: Path) -> None:
    path = tmp_path / "model" / "transformer" / WEIGHTS["transformer"]
    assert batch("--limit", 1).returncode == 0
    size = path.stat().st_size
    rewrite(
        path,
        lambda tensors: (
            tensors
            | {
                name: tensor * 2
                for name, tensor in tensors.items()
                if name.startswith("transformer_blocks.1.attn.to_q")
            }
        ),
    )
    assert path.stat().st_size == size
    result = batch()
    assert result.returncode == 1
    assert "holds a job with other settings: --model was model (weights 2:" in result.stderr
    assert len(read_rows(tmp_path / "out" / "manifest.jsonl")) == 1


def test_force_finds_the_directory_of_its_own_model(batch: Command, tmp_path: Path) -> None:
    """Each directory is held to the fingerprint of its own kind."""
    assert batch("--limit", 1).returncode == 0
    with_old_fingerprint(tmp_path / "out", tmp_path / "model")
    assert batch("--force").returncode == 0
    assert not (tmp_path / "out-2").exists()
    edit(tmp_path / "model" / "vae" / "config.json", scaling_factor=0.5)
    for _ in "ab":
        assert batch("--force").returncode == 0
    assert len(read_rows(tmp_path / "out-2" / "manifest.jsonl")) == 2
    assert not (tmp_path / "out-3").exists()


def test_every_part_is_looked_at_before_any_is_loaded(batch: Command, tmp_path: Path) -> None:
    (tmp_path / "model" / "vae" / WEIGHTS["vae"]).write_text("version https://git-lfs.github.com/spec/v1\n")
    result = batch()
    assert result.returncode == 1
    assert "git-lfs pointer" in result.stderr and "loading" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_single_files_draw_what_the_directory_draws(batch: Command, tmp_path: Path) -> None:
    """In this process and in a worker's; and a job knows its files by what is in them."""
    model = tmp_path / "model"
    whole = all_in_one(model, tmp_path / "flux1-dev.safetensors")
    options = [
        word for part in ("transformer", "vae", "text-encoder", "text-encoder-2") for word in (f"--{part}", whole)
    ]
    assert batch().returncode == 0
    for words in (("-o", "files"), ("-o", "worker", "--workers", 1)):
        done = batch(*options, *words)
        assert done.returncode == 0, done.stderr
    images = [
        [read_image(tmp_path / out / "images" / f"{id}.png") for id in "ab"] for out in ("out", "files", "worker")
    ]
    assert images[0] == images[1] == images[2] and images[0][0] != images[0][1]
    with Image.open(tmp_path / "files" / "images" / "a.png") as image:
        assert image.info["parameters"].endswith("Model: flux1-dev.safetensors")
    whole.rename(whole.with_name("renamed.safetensors"))
    renamed = [whole.with_name("renamed.safetensors") if word == whole else word for word in options]
    assert "2 images were done before" in batch(*renamed, "-o", "files").stderr
    rewrite(renamed[1], lambda given: {**given, "vae.decoder.conv_in.bias": given["vae.decoder.conv_in.bias"] + 1})
    refused = batch(*renamed, "-o", "files")
    assert refused.returncode == 1 and "holds a job with other settings: --model was model" in refused.stderr


def read_image(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_gen_takes_single_files(inside: Command, pipeline: Callable[..., Path], tmp_path: Path) -> None:
    model = pipeline(DEV)
    whole = all_in_one(model, tmp_path / "flux1-dev.safetensors")
    done = inside("gen", "x", "-m", model, "--transformer", whole, "--vae", whole, *SMALL[2:], "-o", "x.png")
    assert done.returncode == 0, done.stderr
    lacking = inside("gen", "x", "-m", model, "--vae", "gone.safetensors", *SMALL[2:])
    assert (lacking.returncode, lacking.stderr) == (1, "Error: --vae gone.safetensors: no such file\n")
    alone = inside("gen", "x", "-m", whole, *SMALL[2:])
    assert alone.returncode == 1  # FLUX.1's own sizes are brought, and this is a small one
    assert "misshapen" in alone.stderr and len(alone.stderr.splitlines()) == 2
