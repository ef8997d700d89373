"""A job on a Ray cluster is the job on one process: same rows, same pixels, whatever becomes of actors and nodes."""

import os
import signal
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fluxcli.core.errors import FluxcliError, JobError
from fluxcli.core.records import ShapeKey
from fluxcli.job.fleet.cluster.cluster import Cluster
from fluxcli.job.fleet.deadlines import Patience
from fluxcli.job.fleet.warming import warm_up
from tests.conftest import read_rows
from tests.job import harness
from tests.job.fleet import drawing, fleets
from tests.job.fleet.cluster.conftest import SMALL, workers
from tests.job.fleet.test_fleet import ended, failures, wait_for

PROMPTS = [f"image {n}" for n in range(14)]
SHORT = Patience(start=60.0, warm_up=drawing.PATIENCE, batch=drawing.PATIENCE, times=0.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    return fleets.alone(fleets.write_rows(folder / "rows.jsonl", PROMPTS), folder / "job")


@pytest.mark.parametrize("folder", ["shared", "unseen"])
def test_actors_make_what_one_process_makes(folder: str, undisturbed, actors, tmp_path, capsys) -> None:
    """In a directory that they see, and one whose images they have to send."""
    rows, pids, directory = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "pids", tmp_path / folder
    assert fleets.run(rows, directory, actors(2, pids=str(pids), seconds=0.05)) == 0
    fleets.check(directory, undisturbed)
    assert fleets.gone(pids, 5.0)
    (run,) = read_rows(directory / "runs.jsonl")
    made = [row["worker"] for row in harness.manifest(directory)]
    assert [worker["images"] for worker in run["workers"]] == [made.count(number) for number in range(2)]
    assert {(worker["starts"], worker["deaths"]) for worker in run["workers"]} == {(1, 0)}
    told = {(worker["device"], worker["host"]) for worker in run["workers"] if worker["images"]}
    assert told and told <= {("seed", os.uname().nodename), ("seed", "second")}
    sent = [line for line in capsys.readouterr().err.splitlines() if line.endswith("its images are sent through Ray")]
    assert bool(sent) == (folder == "unseen") and all(f"does not see {directory}:" in line for line in sent)


@pytest.mark.parametrize(
    ("how", "folder"),
    [
        ("die", "unseen"),
        ("lie", "shared"),
        *(
            pytest.param(how, folder, marks=pytest.mark.slow)
            for how in ("die", "fail", "freeze", "mumble")
            for folder in ("shared", "unseen")
            if (how, folder) != ("die", "unseen")
        ),
    ],
)
def test_an_actor_that_misbehaves_is_replaced_and_costs_nothing(
    how: str, folder: str, undisturbed, actors, tmp_path, capsys
) -> None:
    """Lying is of images that are not there, mumbling of messages that are none."""
    rows, once = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "once"
    patience = SHORT if how == "freeze" else None
    workers = actors(2, patience, how=how, at="p5", once=str(once), seconds=0.01)
    reason = {
        "die": "its worker process has died",
        "fail": "the device failed at 4 x 64x64",
        "freeze": "gave no answer for ",
        "lie": "sent a message that cannot be meant: an image that is not there",
        "mumble": "sent no JSON",
    }[how]
    fleets.check_replaced(tmp_path / folder, rows, workers, once, how, reason, undisturbed, capsys)


@pytest.mark.slow
def test_an_actor_that_wakes_past_its_deadline_costs_nothing(undisturbed, actors, tmp_path) -> None:
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "pids"
    (tmp_path / "once").touch()

    def wake() -> None:
        wait_for(lambda: not (tmp_path / "once").exists())
        time.sleep(1.2 * drawing.PATIENCE)
        for pid in map(int, pids.read_text().split()):
            os.kill(pid, signal.SIGCONT)

    waking = threading.Thread(target=wake)
    waking.start()
    freezing = actors(2, SHORT, how="freeze", at="p5", once=str(tmp_path / "once"), pids=str(pids))
    assert fleets.run(rows, tmp_path / "job", freezing) == 0
    waking.join()
    fleets.check(tmp_path / "job", undisturbed)


@pytest.mark.slow
def test_a_row_that_kills_is_alone_in_the_end_and_fails(undisturbed, actors, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    assert fleets.run(rows, tmp_path / "job", actors(2, how="die", at="p6")) == 3
    ((id, kind, message),) = failures(tmp_path / "job")
    assert (id, kind) == ("p6", "worker_died") and "its worker process has died" in message
    fleets.check(tmp_path / "job", {id: row for id, row in undisturbed.items() if id != "p6"})


def test_a_node_that_is_lost_costs_nothing(nodes: Any, actors, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", [f"image {n}" for n in range(160)])
    expected = fleets.alone(rows, tmp_path / "one")
    node = nodes.add_node(num_cpus=2, **SMALL)
    directory, pids = tmp_path / "job", tmp_path / "pids"
    running = set()

    def lose() -> None:
        wait_for(lambda: len(harness.manifest(directory)) > 20 and len(pids.read_text().split()) == 5)
        running.update(map(int, pids.read_text().split()))
        nodes.remove_node(node, allow_graceful=False)

    losing = threading.Thread(target=lose)
    losing.start()
    # As many as there are CPUs: of those that were on the node nothing can be started again.
    assert fleets.run(rows, directory, actors(5, pids=str(pids), seconds=0.3)) == 0
    losing.join()
    assert running
    fleets.check(directory, expected)
    (run,) = read_rows(directory / "runs.jsonl")
    assert sum(worker["deaths"] for worker in run["workers"]) == 2


def test_actors_of_a_job_that_was_killed_end_and_the_next_goes_on(undisturbed, nodes, tmp_path, actors) -> None:
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "pids"

    def doomed() -> None:
        fleets.run(rows, tmp_path / "job", workers(Cluster(nodes.address), 2, pids=str(pids), seconds=0.3))

    child = fleets.started(doomed)
    wait_for(lambda: bool(harness.manifest(tmp_path / "job")))
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    assert fleets.gone(pids, 10.0)
    assert 0 < len(harness.manifest(tmp_path / "job")) < len(PROMPTS)
    assert fleets.run(rows, tmp_path / "job", actors(2)) == 0
    fleets.check(tmp_path / "job", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_commits_what_is_begun(number: signal.Signals, code: int, nodes, undisturbed, tmp_path) -> None:
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS * 3), tmp_path / "pids"

    def interrupted() -> None:
        os.setpgid(0, 0)  # what a terminal sends its signals to
        os._exit(fleets.run(rows, tmp_path / "job", workers(Cluster(nodes.address), 2, pids=str(pids), seconds=0.3)))

    child = fleets.started(interrupted)
    wait_for(lambda: bool(harness.manifest(tmp_path / "job")))
    os.killpg(child, number)
    assert ended(child) == code
    assert fleets.gone(pids, 5.0)
    made = len(harness.manifest(tmp_path / "job"))
    assert 2 * harness.BATCH <= made <= 6 * harness.BATCH, "batches in flight were lost, or more were begun"
    (run,) = read_rows(tmp_path / "job" / "runs.jsonl")
    assert run["exit_status"] == code and sum(worker["deaths"] for worker in run["workers"]) == 0
    assert not [path for path in (tmp_path / "job" / "images").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("folder", ["unseen", pytest.param("shared", marks=pytest.mark.slow)])
def test_a_cluster_that_is_lost_ends_the_job_and_the_next_goes_on(folder: str, undisturbed, cluster, actors, tmp_path):
    """Its process stands for it: without its own machine's Ray that is no more either."""
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "pids"

    def lose() -> None:
        wait_for(lambda: bool(harness.manifest(tmp_path / folder)))
        cluster._process.kill()

    losing = threading.Thread(target=lose)
    losing.start()
    with pytest.raises(FluxcliError, match=r"--ray .*: the cluster is lost: .*; run again to go on"):
        fleets.run(rows, tmp_path / folder, actors(2, pids=str(pids), seconds=0.3))
    losing.join()
    assert fleets.gone(pids, 10.0)
    assert fleets.run(rows, tmp_path / folder, fleets.fleet(2)) == 0
    fleets.check(tmp_path / folder, undisturbed)


@pytest.mark.slow
def test_a_job_whose_own_machine_leaves_the_cluster_ends(nodes: Any, tmp_path) -> None:
    """As Ray has it: the job's process is alive, and its node dead."""
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS * 4), tmp_path / "pids"
    others = nodes.__class__(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **SMALL})

    def leave() -> None:
        wait_for(lambda: bool(harness.manifest(tmp_path / "job")))
        others.head_node.all_processes["raylet"][0].process.kill()

    leaving = threading.Thread(target=leave)
    leaving.start()
    told = r"the cluster is lost: this machine has left it\. Nothing committed is lost; run again to go on"
    with closing(Cluster(others.address)) as joined, pytest.raises(FluxcliError, match=told):
        fleets.run(rows, tmp_path / "job", workers(joined, 2, pids=str(pids), seconds=5.0))
    leaving.join()
    others.shutdown()
    assert fleets.gone(pids, 10.0)
    assert fleets.run(rows, tmp_path / "job", fleets.fleet(2)) == 0
    fleets.check(tmp_path / "job", fleets.alone(rows, tmp_path / "one"))


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_ends_the_job(actors, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    with pytest.raises(JobError, match=r"images/p\d+.png: cannot be written: No space left on device"):
        fleets.run(rows, tmp_path / "job", actors(2, how="fill", at="p9"))


def test_each_actor_has_a_gpu_of_its_own(actors, tmp_path) -> None:
    rows, log = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "visible"
    assert fleets.run(rows, tmp_path / "job", actors(2, gpu=True, visible=str(log), seconds=0.2)) == 0
    assert sorted(log.read_text().split()) == ["0", "1"]


@pytest.mark.parametrize(
    ("start", "words"),
    [
        pytest.param(
            *("exit", r"its worker process has died; 3 starts in a row finished no batch. No worker is left"),
            marks=pytest.mark.slow,
        ),
        ("model", "--model x: its weights are not what they should be"),
    ],
)
def test_actors_that_cannot_start_stop_the_job(start: str, words: str, actors, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    with pytest.raises(FluxcliError, match=words):
        fleets.run(rows, tmp_path / "job", actors(1, start=start))
    assert not harness.manifest(tmp_path / "job")


def test_other_versions_than_the_jobs_are_told_before_work(nodes, tmp_path, monkeypatch) -> None:
    rows, pids = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS), tmp_path / "pids"
    monkeypatch.syspath_prepend(Path(__file__).parent / "older")
    told = r"worker 0 on \S+ has torch [\d.]+, this job 1\.0\.0: images depend on it"
    with closing(Cluster(nodes.address)) as older, pytest.raises(FluxcliError, match=told):
        fleets.run(rows, tmp_path / "job", workers(older, 1, pids=str(pids)))
    assert not pids.exists() and not [*(tmp_path / "job" / "images").iterdir()]


def test_a_machine_without_fluxcli_is_told_before_work(nodes, actors, tmp_path) -> None:
    rows = fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    nodes.bare.touch()
    told = (
        r"worker 0: fluxcli cannot be started there: .*No module named 'fluxcli.*It must be installed on every machine"
    )
    try:
        with pytest.raises(FluxcliError, match=told):
            fleets.run(rows, tmp_path / "job", actors(1))
    finally:
        nodes.bare.unlink()


def test_shapes_are_made_ready_once_on_each_machine(actors, tmp_path) -> None:
    keys = [ShapeKey(4, side, 64, 64) for side in range(64, 128, 16)]
    ready = warm_up(actors(3), keys, lambda one: None, lambda text: None)
    assert sorted(one.key for one in ready) == sorted(2 * keys)  # by three workers on two


@pytest.mark.slow
def test_a_job_without_a_gpu_of_its_own_has_those_of_the_cluster(nodes, command, tmp_path) -> None:
    """Those are none, for torch, which the workers tell."""
    fleets.write_rows(tmp_path / "rows.jsonl", PROMPTS)
    words = ("batch", "rows.jsonl", "-o", "job", "-m", "tiny", "--ray", nodes.address)
    planned = command(*words, "--dry-run", "--json", cwd=tmp_path)
    assert planned.returncode == 0 and planned.json["workers"] == 2, planned.stderr
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "sees no CUDA GPU; use --device cpu; 3 starts in a row finished no batch" in done.stderr
