"""One directory, one input: what is written down of it, what another one is, and what goes on as ever."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fluxcli.core.errors import JobError
from tests.conftest import read_rows, write_rows
from tests.job import harness
from tests.job.harness import SeedEngine


def prompts(path: Path, *prompts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def images(directory: Path) -> list[str]:
    return [row["prompt"] for row in read_rows(directory / "manifest.jsonl")]


def input_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "job.json").read_text())["input"]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A directory with the images of A/prompts.txt."""
    assert harness.run(prompts(tmp_path / "A" / "prompts.txt", "one", "two"), tmp_path / "job") == 0
    return tmp_path / "job"


def test_a_job_says_what_it_was_given(job: Path, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"one\ntwo\n").hexdigest()
    given = {"path": str(tmp_path / "A" / "prompts.txt"), "sha256": sha256, "rows": 2}
    assert input_of(job) == {**given, "images": 2}
    (run,) = read_rows(job / "runs.jsonl")
    assert run["input"] == given


def test_another_input_is_refused_and_leaves_nothing(job: Path, tmp_path: Path) -> None:
    other = prompts(tmp_path / "B" / "prompts.txt", "three", "four", "five")
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    with pytest.raises(JobError, match=r"job of .*A/prompts\.txt, and .*B/prompts\.txt has none of its rows.*--append"):
        harness.run(other, job)
    assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before


def test_append_adds_another_input_and_both_go_on(job: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "more.jsonl", [{"id": "x", "prompt": "three"}, {"id": "y", "prompt": "four"}])
    with pytest.raises(JobError, match="--append"):
        harness.run(other, job)
    assert harness.run(other, job, append=True) == 0
    assert images(job) == ["one", "two", "three", "four"]
    assert input_of(job)["images"] == 4
    for input in (tmp_path / "A" / "prompts.txt", other):
        nothing = SeedEngine()
        assert harness.run(input, job, nothing) == 0
        assert nothing.batches == []


def test_an_input_may_grow_and_move_and_be_edited(job: Path, tmp_path: Path) -> None:
    input = tmp_path / "A" / "prompts.txt"
    assert harness.run(prompts(input, "one", "two", "three"), job) == 0
    moved = input.rename(tmp_path / "moved.txt")
    assert harness.run(moved, job) == 0
    assert harness.run(prompts(tmp_path / "grown.txt", "one", "two", "three", "four"), job) == 0
    assert images(job) == ["one", "two", "three", "four"]
    assert input_of(job) | {"sha256": ""} == {
        "path": str(tmp_path / "grown.txt"), "sha256": "", "rows": 4, "images": 4,
    }  # fmt: skip
    edited = prompts(tmp_path / "grown.txt", "another", "two", "three", "four")
    assert harness.run(edited, job) == 3, "its changed row has failed, as ever"


def test_the_same_path_is_never_another_input(job: Path, tmp_path: Path) -> None:
    assert harness.run(prompts(tmp_path / "A" / "prompts.txt", "other", "rows"), job) == 3
    assert images(job) == ["one", "two"]


def test_failed_rows_put_right_are_of_the_job(tmp_path: Path) -> None:
    rows = [{"id": "good", "prompt": "a"}, {"id": "bad", "prompt": "b", "width": 100}]
    assert harness.run(write_rows(tmp_path / "in.jsonl", rows), tmp_path / "job") == 3
    fixed = (tmp_path / "job" / "failures.jsonl").read_text().replace('"width": 100}', '"width": 96}')
    (tmp_path / "fixed.jsonl").write_text(fixed)
    assert harness.run(tmp_path / "fixed.jsonl", tmp_path / "job") == 0
    assert images(tmp_path / "job") == ["a", "b"]


def test_a_directory_from_before_takes_any_input_and_writes_it_down(job: Path, tmp_path: Path) -> None:
    before = json.loads((job / "job.json").read_text())
    del before["input"]
    (job / "job.json").write_text(json.dumps(before))
    other = write_rows(tmp_path / "more.jsonl", [{"id": "x", "prompt": "three"}])
    assert harness.run(other, job) == 0
    assert input_of(job)["path"] == str(other)


@pytest.mark.parametrize("value", [None, [], {"path": 1}, {"path": None, "sha256": "", "rows": -1, "images": 0}])
def test_a_forged_input_is_refused(job: Path, tmp_path: Path, value: Any) -> None:
    values = json.loads((job / "job.json").read_text())
    (job / "job.json").write_text(json.dumps({**values, "input": value}))
    with pytest.raises(JobError, match=r"job\.json: is not a fluxcli job file"):
        harness.run(tmp_path / "A" / "prompts.txt", job)


def test_a_directory_with_files_of_others_is_refused(tmp_path: Path) -> None:
    input = prompts(tmp_path / "photos" / "prompts.txt", "one")
    (tmp_path / "photos" / ".hidden").touch()
    (tmp_path / "photos" / "cat.png").write_bytes(b"mine")
    with pytest.raises(JobError, match=r"photos: has cat\.png but no job\.json"):
        harness.run(input, tmp_path / "photos")
    (tmp_path / "photos" / "cat.png").unlink()
    assert harness.run(input, tmp_path / "photos") == 0, "an input may lie in its own job"
