"""A job's directory: whose it is, what is committed, and what a start finds and mends."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxcli.core.errors import JobError, RowError
from fluxcli.core.records import Failure, PromptRecord
from fluxcli.job.output import sink
from fluxcli.job.output.committed import committed_status, content, record_settings
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.output.sink import Written
from fluxcli.job.output.store import JobStore
from tests.conftest import read_rows

OPTIONS = {"dtype": "float32", "text_lengths": [64, 512], "steps": 4, "guidance": 3.5, "seed": 0, "format": "png"}
IDENTITY: dict[str, Any] = {"model": {"name": "m", "revision": None, "fingerprint": "f" * 32}, "options": OPTIONS}


def identity(**options: Any) -> dict[str, Any]:
    return {**IDENTITY, "options": {**OPTIONS, **options}}


def record(id: str, prompt: str = "a bench") -> PromptRecord:
    return PromptRecord(id, prompt, 7, 64, 64, 4, 3.5, 1)


def row_of(store: JobStore, written: Written, record: PromptRecord) -> ManifestRow:
    return ManifestRow(
        file_name=written.file_name,
        sha256=written.sha256,
        run=store.run,
        finished_at=written.finished_at,
        **record_settings(record),
        id=record.id,
    )


def commit(store: JobStore, ids: Sequence[str], first: int = 0) -> None:
    written = [store.write(store.place(id, first + n), f"picture {id}".encode()) for n, id in enumerate(ids)]
    store.commit(written, [row_of(store, each, record(id)) for id, each in zip(ids, written, strict=True)])


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def reopen(tmp_path: Path, said: list[str]) -> Iterator[Callable[..., JobStore]]:
    """Opens the job's directory, closing what was open before."""
    stores: list[JobStore] = []

    def reopen(job: dict[str, Any] = IDENTITY) -> JobStore:
        if stores:
            stores[-1].close()
        stores.append(JobStore(tmp_path / "job", job, ".png", said.append))
        return stores[-1]

    yield reopen
    for store in stores:
        store.close()


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


# Commit and reopen


def test_what_is_committed_is_there_after_reopening(reopen, said: list[str]) -> None:
    store = reopen()
    commit(store, ["a", "b"])
    store = reopen()
    assert [store.status(record(id)) for id in "abc"] == ["done", "done", None]
    assert said == []
    rows = read_rows(store.directory / "manifest.jsonl")
    assert [row["id"] for row in rows] == ["a", "b"]
    for row in rows:
        data = (store.directory / row["file_name"]).read_bytes()
        assert data == f"picture {row['id']}".encode()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]


def test_what_is_written_but_not_committed_is_not_part_of_the_job(reopen) -> None:
    store = reopen()
    store.write(store.place("a", 0), b"half a batch")
    assert not (store.directory / "images" / "a.png").exists()
    store = reopen()
    assert store.status(record("a")) is None
    assert read_rows(store.directory / "manifest.jsonl") == []
    assert not files(store.directory / "images"), "a temporary stayed behind"


def test_a_picture_without_a_row_is_made_again_in_its_place(reopen) -> None:
    store = reopen()
    commit(store, ["a"])
    (store.directory / "images" / "b.png").write_bytes(b"renamed, and then the machine died")
    store = reopen()
    assert store.status(record("b")) is None
    commit(store, ["b"], first=1)
    assert (store.directory / "images" / "b.png").read_bytes() == b"picture b"
    assert len(files(store.directory / "images")) == 2


def test_a_torn_manifest_line_is_cut_and_said(reopen, said: list[str]) -> None:
    store = reopen()
    commit(store, ["a", "b"])
    path = store.directory / "manifest.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + 30])
    store = reopen()
    assert path.read_bytes() == whole[:first]
    assert [store.status(record(id)) for id in "ab"] == ["done", None]
    assert "manifest.jsonl" in " ".join(said)
    commit(store, ["b"], first=1)
    assert [row["id"] for row in read_rows(path)] == ["a", "b"]


def test_a_manifest_that_is_one_torn_line_is_emptied(reopen) -> None:
    store = reopen()
    path = store.directory / "manifest.jsonl"
    path.write_bytes(b'{"id": "a", "promp')
    store = reopen()
    assert path.read_bytes() == b""


def test_a_corrupt_line_amid_the_manifest_is_refused_with_file_and_line(reopen) -> None:
    store = reopen()
    commit(store, ["a", "b"])
    path = store.directory / "manifest.jsonl"
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(JobError, match=r"manifest\.jsonl, line 1"):
        reopen()
    assert path.read_bytes().startswith(b"garbage\n"), "what cannot be read is not thrown away"


@pytest.mark.parametrize("harm", ["missing", "altered", "truncated"])
def test_a_picture_that_is_missing_or_altered_is_redone_and_said(reopen, said: list[str], harm: str) -> None:
    store = reopen()
    commit(store, ["a", "b", "c"])
    picture = store.directory / "images" / "b.png"
    if harm == "missing":
        picture.unlink()
    else:
        picture.write_bytes(b"" if harm == "truncated" else b"picture B")
    store = reopen()
    assert [store.status(record(id)) for id in "abc"] == ["done", None, "done"]
    assert len(said) == 1
    assert "manifest.jsonl" in said[0]
    assert re.search(r"\bb\b", said[0])
    commit(store, ["b"], first=0)
    store = reopen()
    assert sorted(row["id"] for row in read_rows(store.directory / "manifest.jsonl")) == ["a", "b", "c"]
    assert picture.read_bytes() == b"picture b"
    assert len(said) == 1


@pytest.mark.parametrize("doubled", ["a row", "every row"])
def test_a_doubled_row_goes_and_its_picture_stays(reopen, said: list[str], doubled: str) -> None:
    store = reopen()
    commit(store, ["a", "b"])
    manifest = store.directory / "manifest.jsonl"
    before = manifest.read_text()
    lines = before.splitlines(keepends=True)
    manifest.write_text(before + (lines[0] if doubled == "a row" else before))
    store = reopen()
    assert store.images == 2 and all(store.status(record(id)) == "done" for id in "ab")
    assert manifest.read_text() == before
    assert f"removed {1 if doubled == 'a row' else 2} rows of ids that have another" in said[-1]


def test_the_row_with_a_picture_outlives_its_double_without(reopen) -> None:
    store = reopen()
    commit(store, ["a", "b"])
    manifest = store.directory / "manifest.jsonl"
    rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(rows[0].replace("images/a.png", "images/0001/a.png") + "".join(rows))
    assert reopen().images == 2
    assert manifest.read_text() == "".join(rows)


def test_a_job_that_was_copied_elsewhere_is_still_done(reopen, tmp_path: Path, said: list[str]) -> None:
    store = reopen()
    commit(store, ["a", "b"])
    store.close()
    shutil.copytree(store.directory, tmp_path / "copy", copy_function=shutil.copyfile)  # without the times
    copy = JobStore(tmp_path / "copy", IDENTITY, ".png", said.append)
    assert [copy.status(record(id)) for id in "ab"] == ["done", "done"]
    assert said == []
    copy.close()


def test_a_committed_id_with_another_prompt_is_a_row_error(reopen) -> None:
    store = reopen()
    commit(store, ["a"])
    for opened in (store, reopen()):
        with pytest.raises(RowError, match="a") as error:
            opened.status(record("a", prompt="another"))
        assert error.value.id == "a"


@pytest.mark.parametrize(
    ("before", "after"), [({"guidance_scale": -1.0}, {"guidance_scale": -2.0}), ({"seed": 0}, {"seed": 2**61 - 1})]
)
def test_every_change_is_seen_even_where_pythons_hash_is_blind(before: dict[str, Any], after: dict[str, Any]) -> None:
    committed = replace(record("a"), **before)
    status = committed_status({"a": content(committed)})
    assert status(committed) == "done"
    with pytest.raises(RowError, match="another prompt or other settings"):
        status(replace(committed, **after))


def test_files_lie_at_most_so_many_to_a_directory(reopen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "FILES_PER_DIRECTORY", 3)
    store = reopen()
    commit(store, ["a", "b", "c", "d"])
    store = reopen()
    commit(store, ["e", "f", "g"])
    names = [row["file_name"] for row in read_rows(store.directory / "manifest.jsonl")]
    assert all((store.directory / name).is_file() for name in names)
    per_folder = [
        sum(Path(name).parent == folder for name in names) for folder in {Path(name).parent for name in names}
    ]
    assert max(per_folder) == 3
    assert len(set(names)) == 7
    store = reopen()
    assert all(store.status(record(id)) == "done" for id in "abcdefg")


def test_ten_thousand_is_the_number_of_files_to_a_directory(reopen) -> None:
    store = reopen()
    assert store.place("last", 9_999) == "images/last.png"
    assert store.place("next", 10_000) == "images/0001/next.png"


# Identity


def test_job_json_is_written_once(reopen) -> None:
    store = reopen({**IDENTITY, "created_at": "then"})
    before = (store.directory / "job.json").read_bytes()
    reopen({**IDENTITY, "created_at": "now"})
    assert (store.directory / "job.json").read_bytes() == before
    assert json.loads(before)["options"] == OPTIONS


def test_other_settings_are_refused_with_every_difference_spelled_out(reopen) -> None:
    store = reopen()
    commit(store, ["a"])
    before = {name: (store.directory / name).read_bytes() for name in files(store.directory) if name != ".lock"}
    with pytest.raises(JobError) as error:
        reopen(identity(steps=8, text_lengths=[512]))
    assert str(store.directory) in str(error.value)
    assert "--steps was 4, now 8" in str(error.value)
    assert "--text-lengths was 64,512, now 512" in str(error.value)
    assert "--seed" not in str(error.value)
    assert "--force" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert {name: (store.directory / name).read_bytes() for name in before} == before
    reopen()


def test_another_model_is_refused_and_the_same_one_under_another_name_is_not(reopen) -> None:
    reopen()
    reopen({**IDENTITY, "model": {**IDENTITY["model"], "name": "./m"}})
    with pytest.raises(JobError, match="--model"):
        reopen({**IDENTITY, "model": {**IDENTITY["model"], "fingerprint": "e" * 32}})


def test_another_revision_is_refused_with_both_named(reopen) -> None:
    reopen({**IDENTITY, "model": {**IDENTITY["model"], "revision": "aaaa"}})
    with pytest.raises(JobError, match=r"aaaa.*bbbb"):
        reopen({**IDENTITY, "model": {**IDENTITY["model"], "revision": "bbbb"}})


@pytest.mark.parametrize("name", ["images/cat.png", "manifest.jsonl"])
def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "holiday"
    path = directory / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine\n")
    with pytest.raises(JobError, match="holiday"):
        JobStore(directory, IDENTITY, ".png")
    assert files(directory) == {name}
    assert path.read_bytes() == b"mine\n"


def test_a_job_json_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"name": "a job at the mill"}')
    with pytest.raises(JobError, match=r"job\.json"):
        JobStore(tmp_path, IDENTITY, ".png")


# Failures and runs


def test_failures_count_their_attempts_over_runs(reopen) -> None:
    store = reopen()
    store.fail([Failure("a", 3, "invalid_row", "wrong"), Failure(None, 5, "invalid_row", "worse")])
    store.record_run({"exit_status": 3})
    store = reopen()
    store.fail([Failure("a", 3, "invalid_row", "wrong"), Failure("b", 4, "invalid_row", "new")])
    rows = read_rows(store.directory / "failures.jsonl")
    assert [(row["id"], row["line"], row["attempt"], row["run"]) for row in rows] == [
        ("a", 3, 1, 0),
        (None, 5, 1, 0),
        ("a", 3, 2, 1),
        ("b", 4, 1, 1),
    ]
    assert rows[0] == {
        "id": "a",
        "line": 3,
        "error": {"type": "invalid_row", "message": "wrong"},
        "attempt": 1,
        "run": 0,
    }


def test_a_failure_is_remembered(reopen) -> None:
    store = reopen()
    store.fail([Failure("a", 3, "invalid_row", "wrong"), Failure(None, 5, "invalid_row", "worse")])
    store = reopen()
    assert store.failed_before("a", 3)
    assert store.failed_before(None, 5)
    assert not store.failed_before("b", 4)
    assert not store.failed_before(None, 6)


def test_runs_are_numbered_from_zero(reopen) -> None:
    for number in range(3):
        store = reopen()
        assert store.run == number
        store.record_run({"exit_status": 0})
    assert [row["run"] for row in read_rows(store.directory / "runs.jsonl")] == [0, 1, 2]


# One owner

OWNER = """
import sys, time
from pathlib import Path
from fluxcli.job.output.store import JobStore
JobStore(Path(sys.argv[1]), eval(sys.argv[2]), ".png")
print("open", flush=True)
time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the job's directory."""
    code = [sys.executable, "-c", OWNER, str(tmp_path / "job"), repr(IDENTITY)]
    with subprocess.Popen(code, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"open\n"
        yield process
        process.kill()


def test_a_second_owner_is_refused_with_the_firsts_pid_and_host(owner, reopen) -> None:
    with pytest.raises(JobError) as error:
        reopen()
    assert str(owner.pid) in str(error.value)
    assert socket.gethostname() in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_owner_frees_the_directory_and_its_run_is_noted(owner, reopen, said: list[str], number: int) -> None:
    os.kill(owner.pid, number)
    owner.wait()
    store = reopen()
    assert store.run == 1
    assert len(said) == 1
    assert str(owner.pid) in said[0]
    assert [row["run"] for row in read_rows(store.directory / "runs.jsonl")] == [0]


def test_an_owner_elsewhere_with_a_fresh_heartbeat_is_believed(reopen) -> None:
    store = reopen()
    directory = store.directory
    store.close()
    other = {"pid": 4711, "host": "elsewhere", "started_at": "2026-01-01T00:00:00.000Z", "run": 0}
    (directory / ".lock").write_text(json.dumps(other) + "\n")
    with pytest.raises(JobError, match=r"4711 on elsewhere"):
        reopen()
    os.utime(directory / ".lock", (0, 0))
    assert reopen().run == 1


def test_a_closed_job_leaves_no_lock_behind(reopen) -> None:
    store = reopen()
    store.close()
    assert not [name for name in files(store.directory) if "lock" in name]
