"""The pipelines that benchmarks write and run: what is written loads in fluxcli and in diffusers alike."""

import json
import sys
from pathlib import Path

import pytest

from fluxcli.engine.engine import Engine
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.models.checkpoints import BUILT_IN, resolve
from jobs.bench import pipeline
from jobs.bench.full_size import write
from tests.engine.test_parity import records, reference, run, worst

TINY = BUILT_IN / "tiny"


def test_what_is_written_loads_everywhere_and_draws_the_same(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    total = write(directory, TINY, TINY, shard=500_000)
    files = list(directory.rglob("*.safetensors"))
    assert len(files) > 4 and 0 <= sum(file.stat().st_size for file in files) - total < 100_000
    engine = Engine(resolve(str(directory)), resolve_device("cpu", "float32", None, "auto"))
    rows = records(None, 2, 64, 64, 64, steps=2)
    assert worst(run(engine, rows), reference(directory, rows)) <= 1


def test_diffusers_own_pipeline_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\na green star\n")
    arguments = [TINY, prompts, "--batch-size", 2, "--steps", 2, "--size", 64, "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *map(str, arguments)])
    pipeline.main()
    result = json.loads(capsys.readouterr().out)
    assert result["images_per_hour"] == 3600 * 2 / result["seconds"] > 0
