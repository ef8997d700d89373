"""What only a GPU can show of a bench: its clocks and memory, floors in graphs, compiled peers with their attention."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pipelines import DEEP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


def test_a_bench_on_a_gpu(pipeline, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "fluxcli", "bench", "-m", pipeline(DEEP), "--size", "256x256", "--batch-size", "1,2",
        "--text-lengths", "128", "--steps", "4", "--vs", "diffusers", "--cold-start", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "FLUXCLI_CACHE": str(tmp_path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    data = json.loads(done.stdout)
    assert data["versions"]["driver"]
    assert all(data["clocks"][at]["sm_mhz"] > 0 for at in ("before", "after"))
    one, two = data["shapes"]
    assert 0 < one["peak_memory"] < two["peak_memory"]
    for row in (one, two):
        assert row["peers"].keys() == {"diffusers", "diffusers-compiled"}
        assert 0 < row["percent_of_floor"] < 105
        assert row["warm_up"]["cold_s"] > 0 < row["warm_up"]["cached_s"]
    parity = data["parity"]
    assert parity["ours_to_float32"] <= 1.2 * parity["diffusers_to_float32"]
