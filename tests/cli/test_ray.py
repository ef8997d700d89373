"""`fluxcli batch --ray` and `warmup --ray`, from outside."""

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fluxcli
from fluxcli.job.fleet.cluster import cluster
from fluxcli.job.report.verify import verify
from tests.cli.conftest import SMALL
from tests.conftest import Result, read_rows, write_rows

PROMPTS = [{"prompt": f"a {color} {shape}"} for color in ("red", "green", "blue") for shape in ("circle", "square")]
LOCAL = ("--ray", "local", "--workers", 2)


def test_actors_make_what_one_process_makes(inside: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    for words in (("-o", "one"), ("-o", "two", *LOCAL, "--json")):
        done = inside("batch", "in.jsonl", *words, *SMALL, "--batch-size", 2)
        assert done.returncode == 0, done.stderr
    assert done.json["images"] == len(PROMPTS)  # and nothing else on stdout
    assert "starting 2 workers" in done.stderr and "ray" not in done.stderr.lower(), done.stderr
    one, two = ({row["id"]: row for row in read_rows(tmp_path / name / "manifest.jsonl")} for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == len(PROMPTS)
    for id, row in one.items():
        assert row["seed"] == two[id]["seed"] and two[id]["worker"] in (0, 1)
        images = [np.asarray(Image.open(tmp_path / name / row["file_name"]), dtype=int) for name in ("one", "two")]
        assert abs(images[0] - images[1]).max() <= 1
    assert not verify(tmp_path / "two").problems
    (run,) = read_rows(tmp_path / "two" / "runs.jsonl")
    assert sum(worker["images"] for worker in run["workers"]) == len(PROMPTS)
    assert all(worker["device"] == "cpu" for worker in run["workers"] if worker["images"])
    assert inside("batch", "in.jsonl", "-o", "two", *SMALL).returncode == 0  # in one process: the same job


@pytest.mark.slow
def test_warmup_and_dry_run_on_a_cluster(inside: Callable[..., Result], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ("-m", "tiny", "--size", "64x64", "--size", "64x80", "--text-lengths", "64", "--json")
    done = inside("warmup", *words, *LOCAL)
    assert done.returncode == 0, done.stderr
    assert sorted(shape["height"] for shape in done.json["shapes"]) == [64, 80]
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    done = inside("batch", "in.jsonl", *SMALL, *LOCAL, "--dry-run", "--json")
    assert done.returncode == 0 and done.json["workers"] == 2
    small = {"width": 64, "height": 64, "steps": 1, "device": "cpu"}
    job = fluxcli.Job(tmp_path / "in.jsonl", tmp_path / "out", "tiny", ray="local", workers=1, **small)
    assert job.run()["images"] == len(PROMPTS)


@pytest.mark.slow
def test_no_more_workers_than_the_cluster_has_room_for(
    inside: Callable[..., Result], tmp_path: Path, monkeypatch
) -> None:
    nodes = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 10**8}
    there = nodes.Cluster(initialize_head=True, head_node_args=head)
    address = there.address
    try:
        done = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--ray", address, "--workers", 2)
    finally:
        there.shutdown()
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"--workers 2: the cluster at {address} has 1 CPUs now, one for each" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--ray", "auto", "--gpus", 2), 2, "--gpus and --ray: one or the other"),
        (("--ray", "auto"), 2, "--ray on CPUs needs --workers N"),
        (
            ("--ray", "ray://head:10001", "--workers", 1),
            2,
            "--ray ray://head:10001: give auto, local, or the HOST:PORT",
        ),
        (("--ray", "somewhere", "--workers", 1), 2, "--ray somewhere: give auto, local, or the HOST:PORT"),
        (("--ray", "127.0.0.1:{port}", "--workers", 1), 1, "no cluster answers there: [Errno 111] Connection refused"),
    ],
)
def test_what_cannot_be_meant_is_told_before_any_work(
    words: tuple[Any, ...], code: int, told: str, inside: Callable[..., Result], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    done = inside("batch", "in.jsonl", "-o", "out", *SMALL, *(str(word).format(port=port) for word in words))
    assert done.returncode == code
    assert told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_the_extra(inside: Callable[..., Result], tmp_path: Path, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(cluster, "find_spec", lambda name: None if name == "ray" else real(name))
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    done = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--ray", "auto", "--workers", 1)
    assert done.returncode == 2
    assert "--ray needs Ray, which fluxcli[ray] brings: install that here and on every machine" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_no_cluster(inside: Callable[..., Result], tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(cluster, "_JOINED", 1.0)
    monkeypatch.setattr(cluster, "_LEAVING", 1.0)
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        done = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--ray", address, "--workers", 1)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"--ray {address}: no cluster answers in 1 s" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_carried_cache_is_this_machines(inside: Callable[..., Result], tmp_path: Path) -> None:
    done = inside("warmup", "-m", "tiny", "--size", "64x64", *LOCAL, "--export", "cache.zip")
    assert done.returncode == 2 and "--export and --import are for this machine's cache" in done.stderr
