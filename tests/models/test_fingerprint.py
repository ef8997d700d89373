"""The fingerprint changes with whatever the images come from, in place or not, and with nothing else."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from fluxcli.models.checkpoints import resolve
from fluxcli.models.headers import read_header
from tests.models.conftest import WEIGHTS, edit, rewrite, shard

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")


def fingerprint(model: Path) -> str:
    return resolve(str(model)).fingerprint()


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_change_in_place_of_any_tensor_is_seen(model: Path, part: str) -> None:
    """As a LoRA that is merged into one layer leaves it: the same names, shapes and file length."""
    path = model / part / WEIGHTS[part]
    seen = {fingerprint(model)}
    entries = read_header(path).entries
    with path.open("r+b") as file:
        for entry in entries:
            file.seek(entry.start)
            values = file.read(entry.end - entry.start)
            file.seek(entry.start)
            file.write(bytes(each ^ 1 for each in values))
            file.flush()
            seen.add(fingerprint(model))
    assert len(seen) == 1 + len(entries)


def test_the_beginning_the_middle_and_the_end_of_a_tensor_count(model: Path) -> None:
    path = model / "transformer" / WEIGHTS["transformer"]
    rewrite(path, lambda given: {"big.weight": torch.zeros(4, 1_000_000), **given})
    before = path.read_bytes()
    start = before.index(bytes(16_000_000))
    seen = {fingerprint(model)}
    for place in (100, 8_000_000, 16_000_000 - 100):
        path.write_bytes(before[: start + place] + b"\1" + before[start + place + 1 :])
        seen.add(fingerprint(model))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "file", ["scheduler/scheduler_config.json", "vae/config.json", "tokenizer/merges.txt", "tokenizer_2/tokenizer.json"]
)
def test_a_change_of_a_config_or_a_vocabulary_is_seen(model: Path, file: str) -> None:
    first = fingerprint(model)
    (model / file).write_bytes((model / file).read_bytes() + b"\n")
    assert fingerprint(model) != first


def test_what_nobody_reads_changes_nothing(model: Path) -> None:
    first = fingerprint(model)
    for file in ("transformer/pytorch.bin", "vae/README.md", "tokenizer/notes.txt", "fluxcli2.json"):
        (model / file).write_text("x")
    assert fingerprint(model) == first


def test_the_files_that_are_read_count_not_those_beside_them(model: Path) -> None:
    path = model / "transformer" / WEIGHTS["transformer"]
    old = path.read_bytes()
    shard(path)
    first = fingerprint(model)
    path.write_bytes(old)  # an old single file beside the index: diffusers reads the index, and so does fluxcli
    assert fingerprint(model) == first


def test_the_model_may_lie_elsewhere(model: Path, tmp_path: Path) -> None:
    assert fingerprint(model) == fingerprint(Path(shutil.copytree(model, tmp_path / "copy")))


def as_the_first_version_made_it(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for part in PARTS for path in (model / part).glob("*") if path.is_file()):
        digest.update(f"\0{path.relative_to(model).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
                digest.update(file.read(2**16))
                file.seek(max(file.tell(), path.stat().st_size - 2**16))
            digest.update(file.read())
    return digest.hexdigest()[:32]


def test_beside_an_old_fingerprint_the_model_has_the_one_it_had(model: Path) -> None:
    (model / "vae" / "README.md").write_text("counted then")
    old = as_the_first_version_made_it(model)
    assert resolve(str(model)).fingerprint(known=old) == old
    assert resolve(str(model)).fingerprint(known="2:x") == resolve(str(model)).fingerprint(known=None) != old
    edit(model / "vae" / "config.json", scaling_factor=2.0)
    assert resolve(str(model)).fingerprint(known=old) != old


def test_the_built_in_models_have_the_fingerprints_that_old_jobs_hold() -> None:
    known = {
        "tiny": "fcb39c980ffcef18264486051e5dca36",
        "random:flux-dev": "398fda0e7ca67ab1b1db249346053e3b",
        "random:flux-schnell": "a4d68bcdb5af31274e884ee9ff5f7a7a",
    }
    for name, old in known.items():
        assert resolve(name).fingerprint(old) == old
        assert resolve(name).fingerprint().startswith("2:")


def test_an_old_job_does_not_go_on_with_an_index_that_was_not_read_then(model: Path) -> None:
    path = model / "transformer" / WEIGHTS["transformer"]
    single = path.read_bytes()
    shard(path)
    path.write_bytes(single)
    old = as_the_first_version_made_it(model)
    assert resolve(str(model)).fingerprint(old) != old
