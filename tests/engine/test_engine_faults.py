"""What the real engine makes of faults: memory that runs out, and numbers that leave the range."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.core.errors import OutOfMemory
from fluxcli.core.records import Batch, ShapeKey
from fluxcli.engine.nets.flux1 import Flux
from tests import pipelines
from tests.conftest import read_rows, write_rows
from tests.engine.test_parity import cpu_engine, records, run
from tests.pipelines import DEV


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_is_named_as_such_and_the_engine_goes_on(error: Exception, pipeline, monkeypatch) -> None:
    engine = cpu_engine(pipeline(DEV))
    rows = records(DEV, 2, 64, 64, 64, steps=2)
    before = run(engine, rows)
    with monkeypatch.context() as patch:
        patch.setattr(Flux, "body", lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(OutOfMemory, match="2 x 64x64, text 64"):
            engine.submit(Batch(0, ShapeKey(2, 64, 64, 64), 2, rows))
    assert (run(engine, rows) == before).all()


def test_a_model_that_yields_no_numbers_gives_failure_rows_and_no_pictures(tmp_path: Path, fluxcli) -> None:
    model = pipelines.build(tmp_path / "model", DEV)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"][:] = float("nan")
    save_file(tensors, weights)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "width": 64, "height": 64, "steps": 1}] * 3)
    done = fluxcli("batch", rows, "-m", model, "-o", tmp_path / "job")
    assert done.returncode == 3
    assert [row["error"]["type"] for row in read_rows(tmp_path / "job" / "failures.jsonl")] == ["non_finite"] * 3
    assert not [path for path in (tmp_path / "job").rglob("*.png")]
