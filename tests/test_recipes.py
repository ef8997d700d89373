"""The recipes in jobs/cluster: read by the tools they are for, where those can be had, and what they run is what there
is."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from fluxcli.cli.main import cli
from tests.conftest import read_rows, write_rows

RECIPES = Path(__file__).parents[1] / "jobs" / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((RECIPES / name).read_text())


def test_each_is_known_here() -> None:
    assert {path.name for path in RECIPES.iterdir()} == {
        "Dockerfile",
        "ray-up.yaml",
        "rayjob.yaml",
        "sky.yaml",
        "slurm.sh",
    }


@pytest.mark.parametrize("name", ["ray-up.yaml", "rayjob.yaml", "sky.yaml", "slurm.sh"])
def test_the_job_that_each_runs_can_be_meant(name: str) -> None:
    text = re.sub(r"(\\)?\n\s*(#\s+)?", " ", (RECIPES / name).read_text())
    found = re.findall(r"fluxcli batch (\S+ -o [^'|&]*?)(?='| \|\| | &| submissionMode)", text)
    assert len(found) == 1, found
    words = [word for word in shlex.split(found[0]) if word != "$@"]
    words = ["2" if word.startswith("$((") else word for word in re.sub(r"\$\(\(.*?\)\)", "2", " ".join(words)).split()]
    words[0] = __file__
    with click.Context(cli.commands["batch"]) as context:
        parsed, rest, _ = cli.commands["batch"].make_parser(context).parse_args(words)
    assert parsed["ray"] and rest == []


def test_ray_reads_its_own() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = util.prepare_config(read("ray-up.yaml"))
    util.validate_config(config)
    assert config["available_node_types"]["gpus"]["min_workers"] == config["max_workers"]
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for start in (each for each in starts if "ray start" in each):
        assert start.startswith("RAY_USAGE_STATS_ENABLED=0 ")


def test_skypilot_reads_its_own(tmp_path: Path) -> None:
    pytest.importorskip("sky")
    code = f"import sky; task = sky.Task.from_yaml({str(RECIPES / 'sky.yaml')!r}); assert task.num_nodes == 2"
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=RECIPES.parents[1])


def test_skypilots_keys_are_its_own() -> None:
    """By hand, for where SkyPilot is not installed."""
    task = read("sky.yaml")
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "envs", "setup", "run"}
    assert task["resources"].keys() == {"accelerators", "disk_size"}
    assert task["envs"]["RAY_USAGE_STATS_ENABLED"] == "0"
    for script in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[script], text=True, check=True)


def test_kuberays_keys_are_its_own() -> None:
    """By hand: no package brings KubeRay's schema."""
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec.keys() == {"entrypoint", "submissionMode", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"}
    cluster = spec["rayClusterSpec"]
    assert cluster.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers.keys() == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert cluster["headGroupSpec"].keys() == {"serviceType", "rayStartParams", "template"}
    gpus = 0
    for group, count in ((cluster["headGroupSpec"], 1), (workers, workers["replicas"])):
        pod = group["template"]["spec"]
        assert pod.keys() == {"containers", "volumes"}
        (container,) = pod["containers"]
        assert container.keys() == {"name", "image", "resources", "env", "volumeMounts"}
        assert {each["name"] for each in pod["volumes"]} == {each["name"] for each in container["volumeMounts"]}
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        gpus += count * int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert f"--workers {gpus} " in spec["entrypoint"]


def test_the_releases_of_ray_are_one() -> None:
    """Ray joins no cluster of another release than its own."""
    named = re.findall(
        r"(?:ray==|ray:|rayVersion: \")(\d+\.\d+\.\d+)", "".join(p.read_text() for p in RECIPES.iterdir())
    )
    assert len(named) == 4 and len({*named}) == 1


def test_bash_reads_the_script_for_slurm() -> None:
    subprocess.run(["bash", "-n", RECIPES / "slurm.sh"], check=True)
    directives = re.findall(r"^#SBATCH (\S+)$", (RECIPES / "slurm.sh").read_text(), re.M)
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "signal", "requeue"}
    assert {each.lstrip("-").partition("=")[0] for each in directives} == known


@pytest.mark.slow
def test_the_script_for_slurm_runs_a_job(tmp_path: Path) -> None:
    """On one node without GPUs, where `srun` runs what it is given."""
    pytest.importorskip("ray")
    (tmp_path / "srun").write_text('#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    bin = tmp_path / "venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "activate").write_text(f'PATH="{tmp_path}:{Path(sys.executable).parent}:$PATH"\n')
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a red circle"}, {"prompt": "a blue square"}])
    environment = {
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "0"},
        **{"FLUXCLI_VENV": str(tmp_path / "venv"), "PYTHONPATH": str(RECIPES.parents[1])},
    }
    options = ["-m", "tiny", "--device", "cpu", "--workers", "1", "--width", "64", "--height", "64", "--steps", "1"]
    done = subprocess.run(
        ["bash", RECIPES / "slurm.sh", "in.jsonl", "out", *options],
        **{"cwd": tmp_path, "env": {**os.environ, **environment}, "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "out" / "manifest.jsonl")) == 2
