"""Faults while a job runs: memory, numbers, disks, owners and signals. No fault costs another row its image."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fluxcli.core import files
from fluxcli.core.errors import DeviceError, JobError, OutOfMemory
from fluxcli.core.records import Batch
from fluxcli.job.output import committed, lock, sink
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.output.store import JobStore
from fluxcli.job.report.verify import verify
from fluxcli.job.run.saving import TooManyFailures
from tests.conftest import read_rows
from tests.job import harness
from tests.job.harness import SeedEngine


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return harness.write_input(tmp_path / "rows.jsonl")


@pytest.fixture
def undisturbed(rows: Path, tmp_path: Path) -> dict:
    assert harness.run(rows, tmp_path / "undisturbed") == 0
    return harness.essence(tmp_path / "undisturbed")


def failures(directory: Path) -> list[tuple[str, str]]:
    return [(row["id"], row["error"]["type"]) for row in read_rows(directory / "failures.jsonl")]


def test_a_batch_too_large_for_the_memory_is_halved_and_the_size_remembered(rows, undisturbed, tmp_path) -> None:
    def broken(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        if len(batch.records) > 1:
            raise OutOfMemory("no room")

    engine = SeedEngine(broken)
    assert harness.run(rows, tmp_path / "job", engine) == 0
    assert harness.essence(tmp_path / "job") == undisturbed
    assert [len(ids) for ids in engine.batches[:3]] == [4, 2, 1]
    assert all(len(ids) == 1 for ids in engine.batches[3:]), "the size that fits was not remembered"


def test_a_row_that_never_fits_is_one_failure_row(rows, undisturbed, tmp_path) -> None:
    def broken(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        if any(record.id == "p6" for record in batch.records):
            raise OutOfMemory("no room")

    assert harness.run(rows, tmp_path / "job", SeedEngine(broken)) == 3
    assert failures(tmp_path / "job") == [("p6", "out_of_memory")]
    assert harness.essence(tmp_path / "job") == {id: row for id, row in undisturbed.items() if id != "p6"}


def test_out_of_memory_at_one_batch_in_the_middle(rows, undisturbed, tmp_path) -> None:
    calls = 0

    def broken(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OutOfMemory("no room")

    assert harness.run(rows, tmp_path / "job", SeedEngine(broken)) == 0
    assert harness.essence(tmp_path / "job") == undisturbed


def test_a_row_that_breaks_its_batch_costs_only_itself_and_is_retried_by_the_next_run(
    rows, undisturbed, tmp_path
) -> None:
    def broken(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        if any(record.id == "p3" for record in batch.records):
            raise ValueError("cannot draw this")

    for attempt in (1, 2):
        assert harness.run(rows, tmp_path / "job", SeedEngine(broken)) == 3
        last = read_rows(tmp_path / "job" / "failures.jsonl")[-1]
        assert (last["id"], last["attempt"], last["run"]) == ("p3", attempt, attempt - 1)
        assert last["error"] == {"type": "engine_error", "message": "cannot draw this"}
    fed = SeedEngine()
    assert harness.run(tmp_path / "job" / "failures.jsonl", tmp_path / "fed", fed) == 0
    assert fed.batches == [["p3"]], "its second failure is no second row"
    assert harness.essence(tmp_path / "fed") == {"p3": undisturbed["p3"]}
    skipping = SeedEngine()
    assert harness.run(rows, tmp_path / "job", skipping, retry_failed=False) == 3
    assert skipping.batches == []
    assert harness.run(rows, tmp_path / "job") == 0
    assert harness.essence(tmp_path / "job") == undisturbed


def test_non_finite_output_is_a_failure_row_and_no_black_picture(rows, tmp_path) -> None:
    def broken(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        for slot, record in enumerate(batch.records):
            if record.id == "p5":
                pixels[slot], finite[slot] = 0, False

    assert harness.run(rows, tmp_path / "job", SeedEngine(broken)) == 3
    assert failures(tmp_path / "job") == [("p5", "non_finite")]
    assert not list((tmp_path / "job" / "images").glob("p5*"))


def test_a_failed_device_ends_the_run_but_not_what_was_made(rows, undisturbed, tmp_path) -> None:
    def broken(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        if batch.index == 2:
            raise DeviceError("the device failed")

    with pytest.raises(DeviceError):
        harness.run(rows, tmp_path / "job", SeedEngine(broken))
    assert read_rows(tmp_path / "job" / "runs.jsonl")[-1]["exit_status"] == 1
    made = len(harness.manifest(tmp_path / "job"))
    assert made >= harness.BATCH
    assert harness.run(rows, tmp_path / "job") == 0
    assert harness.essence(tmp_path / "job") == undisturbed


def test_too_many_failures_stop_the_job(rows, tmp_path) -> None:
    def broken(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        raise ValueError("no")

    with pytest.raises(TooManyFailures, match="more than --max-failures 2"):
        harness.run(rows, tmp_path / "job", SeedEngine(broken), max_failures=2)
    assert len(failures(tmp_path / "job")) == 3


@pytest.mark.parametrize("number", [1, 5, 9, 13])
def test_a_full_disk_stops_before_losing_anything(number: int, rows, undisturbed, tmp_path, monkeypatch) -> None:
    calls = 0
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += (tmp_path / "job" / "images").exists()  # what a start does before that is not of interest here
        if calls == number + 4:  # those of images/ and of the directory
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "images/x.png")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match=r"images/x.png: cannot be written: No space left on device; \d+ MiB free"):
        harness.run(rows, tmp_path / "job")
    monkeypatch.setattr(os, "fsync", real)
    assert harness.run(rows, tmp_path / "job") == 0
    assert harness.essence(tmp_path / "job") == undisturbed
    assert not verify(tmp_path / "job").problems


def test_a_really_full_file_system(rows, undisturbed, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts")
    try:
        with pytest.raises(JobError, match="No space left on device"):
            harness.run(rows, disk / "job")
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert harness.run(rows, disk / "job") == 0
        assert harness.essence(disk / "job") == undisturbed
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(JobError, match="Read-only file system"):
            harness.run(rows, disk / "other")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("replaced", [False, True], ids=["gone", "another in its place"])
def test_a_mount_that_vanishes_stops_the_job(replaced: bool, rows, undisturbed, tmp_path) -> None:
    directory, elsewhere = tmp_path / "job", tmp_path / "elsewhere"

    def vanish(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        if batch.index == 1:
            directory.rename(elsewhere)
            if replaced:
                (directory / "images").mkdir(parents=True)
                (directory / ".lock").touch()

    with pytest.raises(JobError, match="cannot be written"):
        harness.run(rows, directory, SeedEngine(vanish))
    found = sorted(path.name for path in directory.rglob("*"))
    assert found == ([".lock", "images"] if replaced else [])
    shutil.rmtree(directory, ignore_errors=True)
    elsewhere.rename(directory)
    assert harness.run(rows, directory) == 0
    assert harness.essence(directory) == undisturbed
    assert not verify(directory).problems


def test_a_deleted_and_an_altered_picture_are_made_again(rows, undisturbed, tmp_path) -> None:
    directory = tmp_path / "job"
    assert harness.run(rows, directory) == 0
    (directory / "images" / "p2.png").unlink()
    altered = directory / "images" / "p7.png"
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    engine = SeedEngine()
    assert harness.run(rows, directory, engine) == 0
    assert sorted(id for ids in engine.batches for id in ids) == ["p2", "p7"]
    assert harness.essence(directory) == undisturbed
    assert not verify(directory).problems


def test_a_copied_directory_is_hashed_once_and_then_trusted(rows, tmp_path) -> None:
    directory = tmp_path / "job"
    assert harness.run(rows, directory) == 0
    for path in (directory / "images").iterdir():
        os.utime(path)
    hashed = []
    real = committed._examined
    try:
        committed._examined = lambda row, sink: hashed.append(row.id) or real(row, sink)
        for _ in range(2):
            engine = SeedEngine()
            assert harness.run(rows, directory, engine) == 0
            assert engine.batches == []
    finally:
        committed._examined = real
    assert len(hashed) == harness.ROWS


def test_a_clock_that_goes_backwards_costs_nothing(rows, undisturbed, tmp_path, monkeypatch) -> None:
    directory = tmp_path / "job"

    def stop(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        if batch.index == 1:
            raise DeviceError("stop here")

    with pytest.raises(DeviceError):
        harness.run(rows, directory, SeedEngine(stop))
    monkeypatch.setattr(sink, "utc_now", lambda: "2001-01-01T00:00:00.000Z")
    assert harness.run(rows, directory) == 0
    assert harness.essence(directory) == undisturbed
    again = SeedEngine()
    assert harness.run(rows, directory, again) == 0
    assert again.batches == []


def test_a_changed_row_under_a_committed_id_is_a_failure_row(rows, tmp_path) -> None:
    assert harness.run(rows, tmp_path / "job") == 0
    before = (tmp_path / "job" / "manifest.jsonl").read_bytes()
    lines = rows.read_text().splitlines()
    lines[4] = json.dumps({"prompt": "something else", "id": "p4"})
    rows.write_text("\n".join([lines[-1], *lines[:-1]]) + "\n")  # and in another order
    assert harness.run(rows, tmp_path / "job") == 3
    assert failures(tmp_path / "job") == [("p4", "changed_row")]
    assert (tmp_path / "job" / "manifest.jsonl").read_bytes() == before


def test_of_two_processes_one_gets_the_directory(rows, undisturbed, tmp_path) -> None:
    def slow(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        time.sleep(0.5)

    first = os.fork()
    if first == 0:
        signal.alarm(60)
        os._exit(harness.run(rows, tmp_path / "job", SeedEngine(slow)))
    while not (tmp_path / "job" / "job.json").exists():
        time.sleep(0.01)
    with pytest.raises(JobError, match=rf"in use by pid {first} on {os.uname().nodename}"):
        harness.run(rows, tmp_path / "job")
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0
    assert harness.essence(tmp_path / "job") == undisturbed


def test_a_dead_owners_directory_is_taken_over_and_its_run_noted(rows, undisturbed, tmp_path) -> None:
    def die(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
        if batch.index == 1:
            harness.die()

    assert harness.forked(lambda: harness.run(rows, tmp_path / "job", SeedEngine(die))) == -signal.SIGKILL
    assert harness.run(rows, tmp_path / "job") == 0
    assert harness.essence(tmp_path / "job") == undisturbed
    runs = read_rows(tmp_path / "job" / "runs.jsonl")
    assert [(run["run"], run["exit_status"]) for run in runs] == [(0, None), (1, 0)]


def test_another_hosts_owner_is_believed_until_its_heart_stops(rows, tmp_path) -> None:
    assert harness.run(rows, tmp_path / "job") == 0
    lock = tmp_path / "job" / ".lock"
    owner = {"pid": 7, "host": "another-host", "started_at": "2026-01-01T00:00:00.000Z", "run": 0}
    lock.write_bytes(files.json_line(owner))
    with pytest.raises(JobError, match="in use by pid 7 on another-host"):
        harness.run(rows, tmp_path / "job")
    os.utime(lock, (time.time() - 1000,) * 2)
    assert harness.run(rows, tmp_path / "job") == 0


@pytest.mark.parametrize("frozen_at", ["before its check", "after its check"])
def test_an_owner_frozen_while_another_took_over_doubles_nothing(
    frozen_at: str, rows, undisturbed, tmp_path, monkeypatch
) -> None:
    """On a shared disk whose flock reaches no other machine: the first wakes amid a commit and is succeeded."""
    monkeypatch.setattr(fcntl, "flock", lambda *args: None)
    directory = tmp_path / "job"
    first = JobStore(directory, harness.job(rows, directory).identity, ".png")

    def commit(store: JobStore, id: str) -> None:
        written = store.write(store.place(id, 0), b"image")
        settings = {"seed": 0, "width": 64, "height": 64, "num_inference_steps": 1, "guidance_scale": None}
        stamp = {"sha256": written.sha256, "finished_at": written.finished_at, "file_name": written.file_name}
        store.commit([written], [ManifestRow(id=id, prompt="x", run=store.run, **settings, **stamp)])

    commit(first, "before")
    monkeypatch.setattr(lock, "machine", lambda: "another")
    os.utime(directory / ".lock", (0, 0))
    second = JobStore(directory, harness.job(rows, directory).identity, ".png")
    if frozen_at == "before its check":
        with pytest.raises(JobError, match="has taken this job over"):
            commit(first, "late")
        commit(second, "next")
        assert [row["id"] for row in harness.manifest(directory)] == ["before", "next"]
    else:
        monkeypatch.setattr(first._lock, "check", lambda **_: None)
        commit(first, "late")
        with pytest.raises(JobError, match=r"manifest\.jsonl: changed by another process"):
            commit(second, "late")
        with pytest.raises(JobError):
            commit(second, "next")
        assert [row["id"] for row in harness.manifest(directory)] == ["before", "late"]
    first.close()
    second.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_commits_the_batch_in_flight_and_a_second_leaves_at_once(
    number: int, code: int, rows, undisturbed, tmp_path
) -> None:
    def interrupted(signals: int) -> int:
        def broken(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
            if batch.index == 1:
                for _ in range(signals):
                    os.kill(os.getpid(), number)

        return harness.run(rows, tmp_path / str(signals), SeedEngine(broken))

    for signals in (1, 2):
        assert harness.forked(lambda n=signals: os._exit(interrupted(n))) == code
        directory = tmp_path / str(signals)
        if signals == 1:
            assert len(harness.manifest(directory)) == 2 * harness.BATCH
            assert read_rows(directory / "runs.jsonl")[-1]["exit_status"] == code
        assert harness.run(rows, directory) == 0
        assert harness.essence(directory) == undisturbed


def test_the_command_line_survives_sigterm(tmp_path) -> None:
    rows = harness.write_input(tmp_path / "rows.jsonl", 400)
    command = [
        sys.executable,
        "-m",
        "fluxcli",
        "batch",
        rows,
        "-m",
        "tiny",
        "-o",
        tmp_path / "job",
        "--batch-size",
        "4",
    ]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "job" / "manifest.jsonl").exists():
        time.sleep(0.05)
    running.terminate()
    _, said = running.communicate(timeout=60)
    assert running.returncode == 143
    assert "stopped by SIGTERM" in said and "Run the same command again" in said
    assert 0 < len(harness.manifest(tmp_path / "job")) < 400
    assert not verify(tmp_path / "job").problems
