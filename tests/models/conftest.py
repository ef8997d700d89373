"""A model that a test may harm, and the tools to do it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fluxcli.models.checkpoints import BUILT_IN

WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the built-in model."""
    return Path(shutil.copytree(BUILT_IN / "tiny", tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; `...` takes one out."""
    given = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in given.items() if value is not ...}))


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Puts other tensors into a weight file."""
    save_file(
        {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, metadata={"format": "pt"}
    )


def shard(path: Path, pieces: int = 3, stem: str | None = None) -> Path:
    """Shares a weight file out among several, with an index. Returns the index."""
    stem = stem or path.name.removesuffix(".safetensors")
    tensors = load_file(path)
    path.unlink()
    placed = {}
    for piece in range(pieces):
        name = f"{stem}-{piece + 1:05}-of-{pieces:05}.safetensors"
        part = dict(list(tensors.items())[piece::pieces])
        save_file(part, path.with_name(name), metadata={"format": "pt"})
        placed |= dict.fromkeys(part, name)
    index = path.with_name(f"{stem}.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": placed}))
    return index
