"""The same pixels as ever: images recorded before the house was rebuilt, made again by the command line.

`python -m tests.engine.test_recorded` records anew; that is right only where pixels are meant to change.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import pipelines
from tests.conftest import ENVIRONMENT, read_rows, write_rows
from tests.pipelines import DEEP, DEV, SCHNELL

RECORD = Path(__file__).with_name("recorded.npz")
ROWS = [
    {"id": "a", "prompt": "a red circle on a white background", "seed": 1},
    {"id": "b", "prompt": "Ünïcödé 星 🐱, quoted", "seed": 2, "guidance": 1.5},
    {"id": "c", "prompt": "a green star left of a blue square " * 12, "seed": 3, "width": 96},
    {"id": "d", "prompt": "a blue square", "seed": 4, "n": 2},
]
SHAPES = {"dev": DEV, "schnell": SCHNELL, "deep": DEEP, "tiny": None}
# One instruction set on every machine: kernels of another may sum in another order.
FIXED = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}


def model(name: str, directory: Path) -> str:
    """A pipeline with weights that do not come from torch's generator, whose numbers follow the instruction set."""
    shape = SHAPES[name]
    if shape is None:
        return "tiny"
    pipelines.build(directory, shape)
    from safetensors.torch import load_file, save_file

    for number, path in enumerate(sorted(directory.rglob("*.safetensors"))):
        draw = np.random.Generator(np.random.PCG64(number))
        tensors = load_file(path)
        for key in sorted(tensors):
            shape = tensors[key].shape
            width = 1.2 * np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
            values = draw.standard_normal(shape, dtype=np.float32) * np.float32(width)
            tensors[key] = torch.from_numpy(values if len(shape) > 1 or "bias" in key else values + 1)
        save_file(tensors, path, metadata={"format": "pt"})
    return str(directory)


OPTIONS = (
    "--width", "64", "--height", "64", "--steps", "3", "--batch-size", "3", "--dtype", "float32", "--device", "cpu",
    "--text-lengths", "64,128",
)  # fmt: skip
RUN = """
import json, sys
from fluxcli.cli.main import cli
for words in json.load(sys.stdin):
    try:
        cli.main(words, prog_name="fluxcli")
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""


def make(directory: Path) -> dict[str, np.ndarray]:
    """Every model's images by "model/id". One process makes them all: starting one takes longer than the images."""
    rows = str(write_rows(directory / "rows.jsonl", ROWS))
    jobs = [
        ("batch", rows, "-o", str(directory / name / "out"), "-m", model(name, directory / name / "m"), *OPTIONS)
        for name in SHAPES
    ]
    subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(jobs).encode(), check=True, capture_output=True,
        env={**os.environ, **ENVIRONMENT, **FIXED},
    )  # fmt: skip
    return {
        f"{name}/{row['id']}": np.asarray(Image.open(directory / name / "out" / row["file_name"]))
        for name in SHAPES
        for row in read_rows(directory / name / "out" / "manifest.jsonl")
    }


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return make(tmp_path_factory.mktemp("recorded"))


@pytest.mark.parametrize("name", SHAPES)
def test_the_recorded_images_are_made_again(name: str, remade: dict[str, np.ndarray]) -> None:
    with np.load(RECORD) as record:
        expected = {key: record[key] for key in record.files if key.startswith(f"{name}/")}
    made = {key: pixels for key, pixels in remade.items() if key.startswith(f"{name}/")}
    assert made.keys() == expected.keys()
    assert np.mean([pixels.std() for pixels in expected.values()]) > 15, "flat images would prove nothing"
    for key, pixels in made.items():
        assert (pixels == expected[key]).all(), f"{key}: {(pixels != expected[key]).sum()} values differ"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        images = make(Path(folder))
    np.savez_compressed(RECORD, **images)
