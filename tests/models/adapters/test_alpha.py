"""The alpha that a file's layers share: diffusers' metadata, PEFT's config, or none."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from fluxcli.core.errors import ModelError
from fluxcli.models.checkpoints import resolve
from tests.models.adapters.test_changes import Q, pair
from tests.pipelines import DEV

OTHER = "transformer.single_transformer_blocks.0.attn.to_k"


def strengths(directory: Path, path: Path) -> dict[str, float]:
    changes = resolve(str(directory)).adapters.changes(path)
    return {change.target.layers[0]: change.strength for change in changes}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1.0, 1.0)),
        ({"lora_alpha": 8}, (2.0, 2.0)),
        ({"lora_alpha": 8, "use_rslora": True}, (4.0, 4.0)),
        ({"lora_alpha": 8, "use_rslora": False, "alpha_pattern": {}}, (2.0, 2.0)),
        ({"lora_alpha": 8, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 2}}, (0.5, 2.0)),
        ({"lora_alpha": 8, "alpha_pattern": {"^single_transformer_blocks.0.attn.to_k$": 2}}, (2.0, 0.5)),
        ({"lora_alpha": 8, "alpha_pattern": {"attn.to_k": 4, "to_q": 12}}, (3.0, 1.0)),
    ],
)
def test_metadata_and_config_say_the_same(
    pipeline, tmp_path: Path, given: dict[str, Any], expected: tuple[float, float]
) -> None:
    tensors = pair() | pair(OTHER)
    metadata = {f"transformer.{key}": value for key, value in given.items()}
    by_diffusers = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, by_diffusers, {"lora_adapter_metadata": json.dumps(metadata), "format": "pt"})
    by_peft = tmp_path / "adapter_model.safetensors"
    save_file(
        {f"base_model.model.{name.removeprefix('transformer.')}": each for name, each in tensors.items()}, by_peft
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **given}))
    for path in (by_diffusers, by_peft):
        found = strengths(pipeline(DEV), path)
        assert math.isclose(found["transformer_blocks.0.attn.to_q"], expected[0])
        assert math.isclose(found["single_transformer_blocks.0.attn.to_k"], expected[1])


def test_a_config_is_part_of_the_hash_and_only_of_its_own_file(pipeline, tmp_path: Path) -> None:
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(pair(), path)
    config.write_text(json.dumps({"lora_alpha": 8}))
    find = lambda path: resolve(str(pipeline(DEV))).adapters.adapter(str(path)).sha256  # noqa: E731
    assert find(path) == hashlib.sha256(path.read_bytes() + config.read_bytes()).hexdigest()
    other = Path(path.rename(tmp_path / "style.safetensors"))
    assert find(other) == hashlib.sha256(other.read_bytes()).hexdigest()
    assert strengths(pipeline(DEV), other)["transformer_blocks.0.attn.to_q"] == 1.0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lora_alpha": "8"}, "lora_alpha must be a number, got 8"),
        ({"lora_alpha": True}, "lora_alpha must be a number, got True"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a number, got inf"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a number, got nan"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
        ({"alpha_pattern": {"(a+)+b": 1}}, r"alpha_pattern (a+)+b is no layer's name"),
    ],
)
def test_configs_that_cannot_be_meant(pipeline, tmp_path: Path, given: dict[str, Any], told: str) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("transformer.", "base_model.model.", 1): each for name, each in pair().items()}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    with pytest.raises(ModelError) as error:
        strengths(pipeline(DEV), path)
    assert told in str(error.value) and "adapter_config.json" in str(error.value)


def test_a_layers_own_alpha_goes_before(pipeline, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "a.safetensors"
    own = {f"{Q}.alpha": torch.tensor(1.0, dtype=torch.bfloat16)}
    save_file(pair() | own, path, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})})
    assert strengths(pipeline(DEV), path)["transformer_blocks.0.attn.to_q"] == 0.25
