"""A job on several processes is the job on one: same rows, same pixels, whatever a worker does."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fluxcli.core.errors import FluxcliError, JobError
from fluxcli.job.fleet.deadlines import Patience
from tests.conftest import read_rows
from tests.job import harness
from tests.job.fleet import drawing, fleets

PROMPTS = [f"image {n}" for n in range(14)]
SHORT = Patience(start=60.0, warm_up=drawing.PATIENCE, batch=drawing.PATIENCE, times=0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    return fleets.alone(fleets.write_rows(folder / "rows.jsonl", PROMPTS), folder / "job")


def failures(directory: Path) -> list[tuple[str, str, str]]:
    rows = read_rows(directory / "failures.jsonl")
    return [(row["id"], row["error"]["type"], row["error"]["message"]) for row in rows]


def test_several_workers_make_what_one_process_makes(tmp_path: Path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", [f"image {n}" for n in range(40)], sizes=(64, 80))
    expected = fleets.alone(rows, tmp_path / "one")
    pids = tmp_path / "pids"
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(3, pids=str(pids), seconds=0.02)) == 0
    fleets.check(tmp_path / "job", expected)
    assert fleets.gone(pids, 0.0)
    (run,) = read_rows(tmp_path / "job" / "runs.jsonl")
    made = [row["worker"] for row in harness.manifest(tmp_path / "job")]
    assert [worker["images"] for worker in run["workers"]] == [made.count(number) for number in range(3)]
    assert [worker["worker"] for worker in run["workers"]] == [0, 1, 2]
    assert sum(worker["batches"] for worker in run["workers"]) == 10
    assert {(worker["starts"], worker["deaths"]) for worker in run["workers"]} == {(1, 0)}
    assert {(worker["device"], worker["host"]) for worker in run["workers"] if worker["images"]} == {
        ("seed", os.uname().nodename)
    }
    assert all("worker" not in row for row in harness.manifest(tmp_path / "one"))
    assert "workers" not in read_rows(tmp_path / "one" / "runs.jsonl")[0]


def test_no_more_workers_are_started_than_there_are_batches(undisturbed, tmp_path) -> None:
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS[:5]), tmp_path / "pids"
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(8, pids=str(pids))) == 0
    (run,) = read_rows(tmp_path / "job" / "runs.jsonl")
    assert len(run["workers"]) == 2 and len(pids.read_text().split()) <= 2


@pytest.mark.parametrize("how", ["die", "fail", "freeze", "babble", "boast", "lie"])
def test_a_worker_that_misbehaves_is_replaced_and_costs_nothing(how: str, undisturbed, tmp_path, capsys) -> None:
    """Boasting is of another's batch, lying of images that are not there."""
    rows, once = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "once"
    patience = SHORT if how == "freeze" else None
    workers = fleets.fleet(2, patience, how=how, at="p5", once=str(once), seconds=0.01)
    reason = {
        "die": "killed by SIGKILL",
        "fail": "the device failed at 4 x 64x64",
        "freeze": "gave no answer for ",
        "babble": "sent no JSON",
        "boast": "sent a message that cannot be meant",
        "lie": "sent a message that cannot be meant: an image that is not there",
    }[how]
    fleets.check_replaced(tmp_path / "job", rows, workers, once, how, reason, undisturbed, capsys)


def test_what_a_ghost_writes_too_late_is_litter(undisturbed, tmp_path, monkeypatch) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    (tmp_path / "once").touch()
    monkeypatch.setenv("HAUNTED", str(tmp_path / "haunted"))
    workers = fleets.fleet(2, SHORT, how="haunt", at="p5", once=str(tmp_path / "once"))
    assert fleets.run(rows, tmp_path / "job", workers) == 0
    end = time.monotonic() + 20
    while not (tmp_path / "haunted").exists() or not (name := (tmp_path / "haunted").read_text()):
        assert time.monotonic() < end, "the ghost never wrote"
        time.sleep(0.05)
    assert name.startswith("images/.")
    assert fleets.run(rows, tmp_path / "job", workers) == 0
    fleets.check(tmp_path / "job", undisturbed)


def test_a_row_that_kills_is_alone_in_the_end_and_fails(undisturbed, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(2, how="die", at="p6")) == 3
    ((id, kind, message),) = failures(tmp_path / "job")
    assert (id, kind) == ("p6", "worker_died")
    assert "killed by SIGKILL" in message
    fleets.check(tmp_path / "job", {id: row for id, row in undisturbed.items() if id != "p6"})
    (run,) = read_rows(tmp_path / "job" / "runs.jsonl")
    # Twice with four rows, once with two, twice alone.
    assert sum(worker["deaths"] for worker in run["workers"]) == 5
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(2)) == 0
    fleets.check(tmp_path / "job", undisturbed)


def test_memory_and_errors_are_one_workers_matter(undisturbed, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(2, most=2, wrong="p6")) == 3
    assert failures(tmp_path / "job") == [("p6", "engine_error", "cannot draw this")]
    fleets.check(tmp_path / "job", {id: row for id, row in undisturbed.items() if id != "p6"})
    (run,) = read_rows(tmp_path / "job" / "runs.jsonl")
    assert sum(worker["deaths"] for worker in run["workers"]) == 0
    sizes = {row["batch"]["size"] for row in harness.manifest(tmp_path / "job")}
    assert max(sizes) == 2


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (
            "exit",
            r"exited with 7 \(no such driver\); 3 starts in a row finished no batch. No worker is left",
        ),
        ("model", "--model x: its weights are not what they should be"),
        ("hang", r"gave no answer for \d s; 3 starts in a row"),
    ],
)
def test_workers_that_cannot_start_stop_the_job_in_their_own_words(start: str, words: str, tmp_path: Path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    patience = Patience(start=0.4, times=0.0) if start == "hang" else Patience()
    with pytest.raises(FluxcliError, match=words):
        fleets.run(rows, tmp_path / "job", fleets.fleet(1, patience, start=start))
    assert read_rows(tmp_path / "job" / "runs.jsonl")[-1]["exit_status"] == 1
    assert not harness.manifest(tmp_path / "job")


def test_one_broken_device_costs_no_other_its_work(undisturbed, tmp_path, capsys) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    workers = fleets.fleet(2, start="broken 1", starts=str(tmp_path / "starts"), seconds=0.1)
    assert fleets.run(rows, tmp_path / "job", workers) == 0
    fleets.check(tmp_path / "job", undisturbed)
    told = "worker 1: this GPU is broken; 3 starts in a row finished no batch, so the others go on without it"
    assert told in capsys.readouterr().err


def test_a_disk_that_a_worker_cannot_write_ends_the_job(undisturbed, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    with pytest.raises(JobError, match=r"images/p\d+.png: cannot be written: No space left on device; \d+ MiB free"):
        fleets.run(rows, tmp_path / "job", fleets.fleet(2, how="fill", at="p9"))
    assert not (tmp_path / "job" / "failures.jsonl").exists()
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(1)) == 0
    fleets.check(tmp_path / "job", undisturbed)


def test_workers_of_a_job_that_was_killed_leave_and_the_next_goes_on(undisturbed, tmp_path) -> None:
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "pids"

    def doomed() -> None:
        fleets.run(rows, tmp_path / "job", fleets.fleet(2, pids=str(pids), seconds=0.3))

    child = fleets.started(doomed)
    wait_for(lambda: bool(harness.manifest(tmp_path / "job")))
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert fleets.gone(pids, 5.0)
    assert 0 < len(harness.manifest(tmp_path / "job")) < len(PROMPTS)
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(2)) == 0
    fleets.check(tmp_path / "job", undisturbed)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_terminals_ctrl_c_commits_what_is_begun(number: signal.Signals, code: int, tmp_path) -> None:
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS * 3), tmp_path / "pids"

    def interrupted() -> None:
        os.setpgid(0, 0)  # what a terminal sends its signals to
        os._exit(fleets.run(rows, tmp_path / "job", fleets.fleet(2, pids=str(pids), seconds=0.3)))

    child = fleets.started(interrupted)
    wait_for(lambda: bool(harness.manifest(tmp_path / "job")))
    os.killpg(child, number)
    assert ended(child) == code
    assert fleets.gone(pids, 0.0)
    made = len(harness.manifest(tmp_path / "job"))
    assert 2 * harness.BATCH <= made <= 6 * harness.BATCH, "batches in flight were lost, or more were begun"
    (run,) = read_rows(tmp_path / "job" / "runs.jsonl")
    assert run["exit_status"] == code and sum(worker["deaths"] for worker in run["workers"]) == 0
    assert not [path for path in (tmp_path / "job" / "images").iterdir() if path.name.startswith(".")]
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(2)) == 0
    fleets.check(tmp_path / "job", fleets.alone(rows, tmp_path / "one"))


@pytest.mark.slow
def test_a_job_that_was_stopped_for_long_takes_no_worker_for_hung(undisturbed, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    workers = fleets.fleet(2, Patience(start=60.0, warm_up=2.0, batch=2.0, times=0.0), seconds=0.2)
    child = fleets.started(lambda: os._exit(fleets.run(rows, tmp_path / "job", workers)))
    wait_for(lambda: bool(harness.manifest(tmp_path / "job")))
    os.kill(child, signal.SIGSTOP)
    time.sleep(5.0)
    os.kill(child, signal.SIGCONT)
    assert ended(child) == 0
    fleets.check(tmp_path / "job", undisturbed)
    (run,) = read_rows(tmp_path / "job" / "runs.jsonl")
    assert sum(worker["deaths"] for worker in run["workers"]) == 0


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(happened) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_modules_of_the_current_directory_are_not_run(undisturbed, tmp_path, monkeypatch) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for module in ("numpy", "json", "fluxcli"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit(13)")
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(1)) == 0
    fleets.check(tmp_path / "job", undisturbed)
