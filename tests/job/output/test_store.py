"""A job's directory: whose it is, what is committed, and what a start finds and mends."""

import errno
import hashlib
import io
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
from PIL import Image

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


def test_an_id_is_committed_once(reopen) -> None:
    store = reopen()
    commit(store, ["a"])
    before = (store.directory / "manifest.jsonl").read_bytes()
    for ids in (["b", "a"], ["c", "c"]):
        with pytest.raises(JobError, match=r"id [ac] is committed already"):
            commit(store, ids, first=1)
        assert (store.directory / "manifest.jsonl").read_bytes() == before
        assert files(store.directory / "images") >= {"a.png"} and not (store.directory / "images" / "b.png").exists()


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_the_first_write_that_fails_ends_all_commits(reopen, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for one moment: what was told stays, whole, and nothing is glued to a torn half."""
    store = reopen()
    commit(store, ["a"])
    manifest = store.directory / "manifest.jsonl"
    before, real, failed = manifest.read_bytes(), getattr(os, call), False

    def full(descriptor: int, *data: bytes) -> int:
        nonlocal failed
        if not failed and os.readlink(f"/proc/self/fd/{descriptor}") == str(manifest):
            failed = True
            if data:
                real(descriptor, data[0][:30])
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(manifest))
        return real(descriptor, *data)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(JobError, match=r"manifest\.jsonl: cannot be written") as first:
            commit(store, ["b"], first=1)
    assert failed
    for _ in range(2):
        with pytest.raises(JobError) as later:
            commit(store, ["c"], first=2)
        assert str(later.value) == str(first.value)
    assert manifest.read_bytes() == before
    store.record_run({"exit_status": 1})  # that much can still be told
    store = reopen()
    assert [store.status(record(id)) for id in "abc"] == ["done", None, None]


def test_rows_behind_a_crashs_zeros_stay_and_what_lacks_a_row_is_redone(reopen, said: list[str]) -> None:
    store = reopen()
    commit(store, ["a", "b"])
    commit(store, ["c", "d", "e"], first=2)
    manifest = store.directory / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:2]) + bytes(100) + lines[2][100:] + b"".join(lines[3:]))
    store = reopen()
    assert [store.status(record(id)) for id in "abcde"] == ["done", "done", None, "done", "done"]
    assert said == [f"{manifest}: removed 1 lines that a crash left unreadable"]
    commit(store, ["c"], first=5)
    assert [row["id"] for row in read_rows(manifest)] == ["a", "b", "d", "e", "c"]
    assert [path.name for path in store.directory.rglob("c.png")] == ["c.png"], "the image without a row went"


def test_a_whole_last_row_without_its_line_end_is_kept(reopen, said: list[str]) -> None:
    store = reopen()
    commit(store, ["a", "b"])
    manifest = store.directory / "manifest.jsonl"
    before = manifest.read_bytes()
    manifest.write_bytes(before.rstrip(b"\n"))  # as editors leave it
    store = reopen()
    assert store.images == 2 and said == [] and manifest.read_bytes() == before


@pytest.mark.parametrize("line", ['{"id": "a"}', "[1]", "garbage", '{"run": "0"}'])
@pytest.mark.parametrize("name", ["manifest.jsonl", "failures.jsonl", "runs.jsonl"])
def test_a_foreign_line_is_refused_with_file_line_and_what_is_wrong(reopen, name: str, line: str) -> None:
    store = reopen()
    commit(store, ["a"])
    store.fail([Failure("b", 2, "t", "m")])
    store.record_run({"exit_status": 0})
    path = store.directory / name
    path.write_text(path.read_text() + line + "\n")
    number = len(path.read_text().splitlines())
    with pytest.raises(
        JobError, match=rf"{name}, line {number}: (is|has|must|run must) .*; run fluxcli verify --repair"
    ):
        reopen()


def test_rows_in_another_form_are_the_same_rows(reopen) -> None:
    """As other programs write JSON: no blanks, keys in another order, escapes, whole numbers for floats."""
    store = reopen()
    commit(store, ["a", "b"])
    manifest = store.directory / "manifest.jsonl"
    rows = [dict(reversed(row.items())) for row in read_rows(manifest)]
    manifest.write_text("".join(json.dumps(row, separators=(",", ":")) + "\r\n" for row in rows))
    store = reopen()
    assert [store.status(record(id)) for id in "ab"] == ["done", "done"]


def test_prompts_are_told_apart_whatever_stands_in_them(reopen) -> None:
    prompts = ['"', "\\", "\\u0022", "é", "\u202e", "a\tb", "\x9b31m", '", "file_name": "images/x.png"']
    records = [replace(record(f"r{n}"), prompt=prompt, guidance_scale=None) for n, prompt in enumerate(prompts)]
    store = reopen()
    written = [store.write(store.place(each.id, n), b"x") for n, each in enumerate(records)]
    rows = [row_of(store, each, one) for each, one in zip(written, records, strict=True)]
    full = {"text_tokens": 1, "text_length": 64, "truncated": False, "batch": {"index": 0}, "timing": {}, "meta": {}}
    store.commit(written, [replace(row, **full) for row in rows])
    store = reopen()
    assert [store.status(each) for each in records] == ["done"] * len(records)
    with pytest.raises(RowError, match="another prompt"):
        store.status(replace(records[1], prompt="\\\\"))


# What is there must not be harmed


def image(color: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(out, **options)
    return out.getvalue()


def commit_image(store: JobStore, id: str, data: bytes, first: int = 0) -> Path:
    written = store.write(store.place(id, first), data)
    store.commit([written], [row_of(store, written, record(id))])
    return store.directory / written.file_name


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_an_image_that_somebody_optimised_is_not_overwritten(reopen, format: str) -> None:
    store = reopen()
    paths = [commit_image(store, id, image("red", format=format), first=n) for n, id in enumerate("abcde")]
    manifest = (store.directory / "manifest.jsonl").read_bytes()
    other = image("blue", format=format)
    paths[1].write_bytes(other)
    with pytest.raises(JobError, match=r"images/b\.png: changed since .*still images.*overwritten") as error:
        reopen()
    assert "verify --repair" in str(error.value) and len(str(error.value).splitlines()) == 2
    assert paths[1].read_bytes() == other and (store.directory / "manifest.jsonl").read_bytes() == manifest
    paths[1].write_bytes(image("red", format=format))  # put back
    assert reopen().images == 5


@pytest.mark.parametrize("harm", ["empty", "cut", "a byte", "the last byte", "something else"])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_what_is_no_whole_image_any_more_is_redone(reopen, said: list[str], format: str, harm: str) -> None:
    store = reopen()
    data = image("red", format=format)
    path = commit_image(store, "a", data)
    if harm == "a byte" and format != "png":
        pytest.skip("only PNG has check sums")
    harmed = {
        "empty": b"",
        "cut": data[: len(data) * 2 // 3],
        "a byte": data[:60] + bytes([data[60] ^ 1]) + data[61:],
        "the last byte": data[:-1] + b"x" if format != "webp" else data[:-1],
        "something else": b"GIF89a" + data,
    }
    path.write_bytes(harmed[harm])
    store = reopen()
    assert store.status(record("a")) is None
    assert "redoing 1 rows: a (image altered)" in said[-1]


def test_a_link_inside_images_is_followed_nowhere(reopen, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    for name in (".a.png.tmp", ".precious.tmp", "sub/.b.png.tmp", "a.png"):
        (home / name).write_bytes(b"precious")
    store = reopen()
    path = commit_image(store, "a", image("red", format="png"))
    before = files(home)
    (store.directory / "images" / "x").symlink_to(home)
    (store.directory / "images" / "0001").symlink_to(home)
    (store.directory / "images" / ".t.png.01234567.tmp").symlink_to(home / "a.png")
    path.unlink()
    path.symlink_to(home / "a.png")
    store = reopen()
    assert store.status(record("a")) is None, "a link is no image"
    commit_image(store, "a", image("blue", format="png"))
    assert files(home) == before and all((home / name).read_bytes() == b"precious" for name in before)
    assert not path.is_symlink()


def test_images_may_lie_on_another_disk(reopen, tmp_path: Path) -> None:
    store = reopen()
    commit(store, ["a"])
    store.close()
    (store.directory / "images").rename(tmp_path / "disk")
    (store.directory / "images").symlink_to(tmp_path / "disk")
    store = reopen()
    assert store.images == 1
    commit(store, ["b"], first=1)
    assert files(tmp_path / "disk") == {"a.png", "b.png"}


@pytest.mark.parametrize("name", ["manifest.jsonl", "failures.jsonl", "runs.jsonl", "job.json", ".lock"])
def test_a_file_of_the_job_that_is_a_link_is_refused(reopen, name: str, tmp_path: Path) -> None:
    store = reopen()
    commit(store, ["a"])
    store.close()
    precious = tmp_path / "thesis.txt"
    precious.write_bytes(b"no end of line")
    (store.directory / name).unlink(missing_ok=True)
    (store.directory / name).symlink_to(precious)
    with pytest.raises(JobError, match=rf"{name}: is a link"):
        reopen()
    assert precious.read_bytes() == b"no end of line"


def test_a_directory_in_an_images_place_is_told_before_anything_is_made(reopen) -> None:
    store = reopen()
    path = commit_image(store, "a", image("red", format="png"))
    path.unlink()
    path.mkdir()
    with pytest.raises(JobError, match=r"images/a\.png: is a directory in an image's place"):
        reopen()


def test_what_killed_processes_left_in_the_directory_is_cleared(reopen) -> None:
    store = reopen()
    commit(store, ["a"])
    store.close()
    left = [".runs.jsonl.tmp", ".manifest.jsonl.0123abcd.tmp", ".job.json.tmp", ".lock-4711.tmp"]
    mine = [".notes.tmp", "manifest.jsonl.tmp"]
    for name in left + mine:
        (store.directory / name).write_bytes(b"half")
    reopen()
    assert not [name for name in left if (store.directory / name).exists()]
    assert all((store.directory / name).exists() for name in mine)


@pytest.mark.parametrize("made", ["the images' directory", "the job's directory"])
def test_names_of_directories_are_on_disk_before_a_row_is(
    reopen, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), real(fd)))
    store = reopen()
    if made == "the job's directory":
        assert {tmp_path, store.directory} <= set(synced)
        return
    synced.clear()
    commit(store, ["a"], first=10_000)
    manifest = synced.index(store.directory / "manifest.jsonl")
    assert store.directory / "images" in synced[:manifest]
    assert store.directory / "images" / "0001" in synced[:manifest]


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


def test_a_row_that_is_bad_as_before_is_not_written_down_again(reopen) -> None:
    store = reopen()
    bad = [Failure("a", 3, "invalid_row", "wrong"), Failure(None, 5, "invalid_row", "worse")]
    store.fail(bad, attempted=False)
    before = (store.directory / "failures.jsonl").read_bytes()
    store = reopen()
    store.fail(bad, attempted=False)
    assert (store.directory / "failures.jsonl").read_bytes() == before
    store.fail(
        [Failure("a", 3, "invalid_row", "wrong otherwise"), Failure(None, 6, "invalid_row", "worse")], attempted=False
    )
    rows = read_rows(store.directory / "failures.jsonl")[2:]
    assert [(row["id"], row["line"], row["attempt"]) for row in rows] == [("a", 3, 2), (None, 6, 1)]


def test_a_failed_row_is_known_by_its_own_id_wherever_it_moved(reopen) -> None:
    store = reopen()
    store.fail([Failure("own", 2, "invalid_row", "m"), Failure("000001", 2, "engine_error", "m")])
    store.fail([Failure("x", 4, "invalid_row", "id x is already used by an earlier row")])
    store.fail([Failure("y", 5, "changed_row", "id y is committed with another prompt")])
    store.fail([Failure("000000391895", 6, "engine_error", "m")])  # a data set's own number
    store = reopen()
    assert store.failed_before("own", 3) and store.failed_before("000000391895", 7)
    assert store.failed_before("000001", 2)
    assert not store.failed_before("000001", 3), "the default id is the row's number: that is another row now"
    assert store.failed_before("x", 4) and not store.failed_before("x", 1), "the first row of the id did not fail"
    assert not store.failed_before("y", 1)
    store.fail([Failure("own", 3, "invalid_row", "m")])
    assert read_rows(store.directory / "failures.jsonl")[-1]["attempt"] == 2


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
