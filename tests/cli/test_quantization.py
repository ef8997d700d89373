"""--quantization, as a user meets it: the job's identity, its rows, and images that differ a little."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import SMALL
from tests.conftest import read_rows, write_rows
from tests.pipelines import DEV

ROWS = [{"id": str(i), "prompt": f"a red circle, {i}"} for i in range(3)]


def images(directory: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(directory / "images" / f"{row['id']}.png")) for row in ROWS]).astype(int)


def test_a_job_in_8_bits(inside, command, pipeline, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    given = ("batch", "in.jsonl", *SMALL, "-m", pipeline(DEV))
    for quantization, sizes in (("none", 3), ("fp8", 3), ("fp8", 1)):
        own = ("-o", f"{quantization}{sizes}", "--quantization", quantization, "--batch-size", sizes)
        assert inside(*given, *own, cwd=tmp_path).returncode == 0
    eight, alone, whole = (images(tmp_path / name) for name in ("fp83", "fp81", "none3"))
    assert np.abs(eight - alone).max() <= 1  # a neighbour changes nothing
    assert np.abs(eight - whole).max() > 1

    rows, old = (read_rows(tmp_path / name / "manifest.jsonl") for name in ("fp83", "none3"))
    assert {row["quantization"] for row in rows} == {"fp8"} and not any("quantization" in row for row in old)
    assert [
        row.get("quantization") for name in ("fp83", "none3") for row in read_rows(tmp_path / name / "runs.jsonl")
    ] == [
        "fp8",
        None,
    ]

    again = inside(*given, "-o", "fp83", "--quantization", "FP8", "--batch-size", 3, cwd=tmp_path)
    assert again.returncode == 0 and read_rows(tmp_path / "fp83" / "manifest.jsonl") == rows
    for name, other, told in (
        ("fp83", "none", "--quantization was fp8, now none"),
        ("none3", "fp8", "--quantization was none, now fp8"),
    ):
        refused = inside(*given, "-o", name, "--quantization", other, cwd=tmp_path)
        assert refused.returncode == 1 and told in refused.stderr
    assert command("verify", "fp83", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("command", ["gen", "warmup", "bench"])
def test_every_command_that_runs_a_model_takes_it(inside, command: str, tmp_path: Path) -> None:
    help = inside(command, "--help", cwd=tmp_path).stdout
    assert "--quantization [none|fp8]" in help
    wrong = inside(command, *(["x"] if command == "gen" else []), "--quantization", "int4", cwd=tmp_path)
    assert wrong.returncode == 2 and "'int4' is not one of 'none', 'fp8'" in wrong.stderr
