"""The adapters that swaps are timed with."""

from pathlib import Path

from fluxcli.models.checkpoints import resolve
from jobs.bench.adapters import written


def test_they_change_every_matrix_of_the_blocks(tmp_path: Path) -> None:
    checkpoint = resolve("tiny")
    made = written(checkpoint, tmp_path / "a.safetensors", 4, 0)
    assert checkpoint.adapters.adapter(made.path) == made
    config = checkpoint.transformer
    changes = checkpoint.adapters.changes(Path(made.path))
    assert len(changes) == 14 * config["num_layers"] - 2 * config["num_layers"] + 5 * config["num_single_layers"]
    assert all("blocks." in change.target.layers[0] for change in changes)
