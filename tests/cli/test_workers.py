"""`fluxcli batch` on several processes, from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxcli.job.report.verify import verify
from tests.cli.conftest import SMALL
from tests.conftest import ENVIRONMENT, Result, read_rows, write_rows

PROMPTS = [{"prompt": f"a {color} {shape}"} for color in ("red", "green", "blue") for shape in ("circle", "square")]


def test_workers_make_what_one_process_makes(inside: Callable[..., Result], tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    for words in (("-o", "one"), ("-o", "two", "--workers", 2)):
        done = inside("batch", "in.jsonl", *words, *SMALL, "--batch-size", 2)
        assert done.returncode == 0, done.stderr
    assert "starting 2 workers" in done.stderr and "Traceback" not in done.stderr
    one, two = ({row["id"]: row for row in read_rows(tmp_path / name / "manifest.jsonl")} for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == len(PROMPTS)
    for id, row in one.items():
        assert row["seed"] == two[id]["seed"] and "worker" not in row and two[id]["worker"] in (0, 1)
        images = [np.asarray(Image.open(tmp_path / name / row["file_name"]), dtype=int) for name in ("one", "two")]
        assert abs(images[0] - images[1]).max() <= 1
    assert not verify(tmp_path / "two").problems
    (run,) = read_rows(tmp_path / "two" / "runs.jsonl")
    assert sum(worker["images"] for worker in run["workers"]) == len(PROMPTS)
    assert (run["images"], run["device"]) == (len(PROMPTS), "cpu")
    assert all(worker["device"] == "cpu" for worker in run["workers"] if worker["images"])
    write_rows(tmp_path / "more.jsonl", [*PROMPTS, {"prompt": "a"}, {"prompt": "b"}])
    planned = [inside("batch", "more.jsonl", *words, *SMALL, "--dry-run", *more) for more in ((), ("--json",))]
    assert "by the images made here: about 0:00:0" in planned[0].stderr and "on 2 workers" in planned[0].stderr
    assert (planned[1].json["workers"], planned[1].json["forecast"]["images"]) == (2, 2)
    done = inside("batch", "in.jsonl", *words, *SMALL)  # and nothing is started for nothing
    assert done.returncode == 0 and "starting" not in done.stderr
    assert inside("batch", "in.jsonl", "-o", "two", *SMALL).returncode == 0  # in one process: the same job


def test_a_worker_draws_by_the_jobs_own_settings(inside: Callable[..., Result], tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", PROMPTS[:2])
    own = (*SMALL, "--steps", 5, "--step-cache", "11001", "--quantization", "fp8")
    for words in (("-o", "one"), ("-o", "two", "--workers", 1)):
        done = inside("batch", "in.jsonl", *words, *own)
        assert done.returncode == 0, done.stderr
    assert inside("batch", "in.jsonl", "-o", "plain", *SMALL, "--steps", 5).returncode == 0
    one, two, plain = (
        np.stack([np.asarray(Image.open(path), dtype=int) for path in sorted((tmp_path / name / "images").iterdir())])
        for name in ("one", "two", "plain")
    )
    assert abs(one - two).max() <= 1 < abs(one - plain).max()
    for name in ("one", "two"):
        rows = read_rows(tmp_path / name / "manifest.jsonl")
        assert {(row["quantization"], row["step_cache"], row["evaluated_steps"]) for row in rows} == {
            ("fp8", "11001", 3)
        }


@pytest.mark.slow
def test_warmup_on_several_processes(inside: Callable[..., Result], tmp_path: Path) -> None:
    words = ("-m", "tiny", "--size", "64x64", "--size", "64x80", "--text-lengths", "64", "--json")
    done = inside("warmup", *words, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert sorted(shape["height"] for shape in done.json["shapes"]) == [64, 80]
    assert done.json["shapes"][0].keys() == inside("warmup", *words).json["shapes"][0].keys()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--workers", 0), 2, "--workers"),
        (("--workers", 2, "--gpus", 2), 2, "--gpus and --workers"),
        (("--gpus", 2), 2, "--device cpu"),
        (("--gpus", 0), 2, "0 GPUs make no image"),
        (("--gpus", "0,2,0"), 2, "GPU 0 is named twice"),
        (("--gpus", "many"), 2, "'many' is neither all, a number of GPUs, nor a list"),
        (("--gpus", "1,"), 2, "'1,' is neither all"),
    ],
)
def test_what_cannot_be_meant_is_told_before_any_work(
    words: tuple[Any, ...], code: int, told: str, inside: Callable[..., Result], tmp_path: Path
) -> None:
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    done = inside("batch", "in.jsonl", "-o", "out", *SMALL, *words)
    assert done.returncode == code
    assert told in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_gpus_may_stand_in_a_config(inside: Callable[..., Result], tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", PROMPTS)
    for value, told in (("[0, 0]", "GPU 0 is named twice"), ("[3]", "leave out --device"), ("true", "neither all")):
        (tmp_path / "job.toml").write_text(f"gpus = {value}\n")
        done = inside("batch", "in.jsonl", *SMALL, "--config", "job.toml")
        assert done.returncode == 2 and told in done.stderr


@pytest.mark.slow
def test_killed_workers_of_a_real_job_cost_no_image(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": f"a red circle, {n}"} for n in range(400)])
    command = [sys.executable, "-m", "fluxcli", "batch", "in.jsonl", "-o", "out", "-m", "tiny", "--device", "cpu"]
    environment = {**os.environ, **ENVIRONMENT}
    running = subprocess.Popen(
        [*command, "--workers", "2", "--batch-size", "4"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
    )
    killed = 0
    while killed < 3:
        made = len(read_rows(tmp_path / "out" / "manifest.jsonl"))
        if made > 80 * killed:
            workers = [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and parent(pid) == running.pid]
            if workers:
                os.kill(workers[0], signal.SIGKILL)
                killed += 1
        assert running.poll() is None
        time.sleep(0.05)
    _, told = running.communicate(timeout=300)
    assert running.returncode == 0, told
    assert told.decode().count("killed by SIGKILL; starting another") == 3
    rows = read_rows(tmp_path / "out" / "manifest.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) == 400
    assert subprocess.run([sys.executable, "-m", "fluxcli", "verify", "out"], cwd=tmp_path).returncode == 0


def parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
