"""The denoiser against FLUX.1's own configs and weight indexes, where they are at hand."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.core.errors import ModelError
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import Flux, FluxConfig
from fluxcli.engine.weights.fill import load_transformer
from fluxcli.models.checkpoints import resolve
from tests import pipelines
from tests.pipelines import DEV, REAL_DEV, REAL_SCHNELL

pytestmark = pytest.mark.skipif(not pipelines.SHARED.is_dir(), reason="FLUX.1's files are not beside the project")
both = pytest.mark.parametrize("real", [REAL_DEV, REAL_SCHNELL], ids=["dev", "schnell"])
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def config_of(directory: Path) -> FluxConfig:
    return FluxConfig.from_json(json.loads((directory / "transformer" / "config.json").read_text()))


def weight_map(directory: Path) -> dict[str, str]:
    mapped: dict[str, str] = json.loads((directory / "transformer" / INDEX).read_text())["weight_map"]
    return mapped


@both
def test_the_real_configs_describe_flux(real: Path) -> None:
    config = config_of(real)
    assert (config.num_layers, config.num_single_layers) == (19, 38)
    assert (config.num_attention_heads, config.attention_head_dim, config.inner_dim) == (24, 128, 3072)
    assert config.guidance_embeds == (real == REAL_DEV)


@both
def test_the_denoiser_wants_exactly_the_tensors_of_the_real_index(real: Path) -> None:
    with torch.device("meta"):
        slots = list(Flux(config_of(real), Reference()).slots())
    names = [name for name, _ in slots]
    assert len(names) == len(set(names))
    assert set(names) == weight_map(real).keys()


def test_the_denoiser_has_the_real_number_of_parameters() -> None:
    with torch.device("meta"):
        slots = list(Flux(config_of(REAL_DEV), Reference()).slots())
    total = json.loads((REAL_DEV / "transformer" / INDEX).read_text())["metadata"]["total_size"]
    assert sum(slot.numel() for _, slot in slots) * 2 == total, "two bytes each in the published bfloat16 files"


@both
def test_the_built_in_architectures_are_the_real_ones(real: Path) -> None:
    built_in = resolve("random:flux-dev" if real == REAL_DEV else "random:flux-schnell")
    assert FluxConfig.from_json(built_in.transformer) == config_of(real)
    ours = json.loads((built_in.directory / "scheduler" / "scheduler_config.json").read_text())
    theirs = json.loads((real / "scheduler" / "scheduler_config.json").read_text())
    assert {key: value for key, value in ours.items() if key[0] != "_"} == {
        key: value for key, value in theirs.items() if key[0] != "_"
    }


@pytest.fixture
def sharded(pipeline, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A small checkpoint in shards, each tensor in the file that the real index puts it in."""
    directory = pipelines.build(tmp_path / "model", DEV)
    single = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(single)
    single.unlink()
    placed = {name: file for name, file in weight_map(REAL_DEV).items() if name in tensors}
    assert placed.keys() == tensors.keys(), "a small FLUX has the names of the large one's first blocks"
    for file in set(placed.values()):
        part = {name: tensors[name] for name in tensors if placed[name] == file}
        save_file(part, single.with_name(file), metadata={"format": "pt"})
    (directory / "transformer" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return directory, placed


def test_a_small_checkpoint_under_the_real_indexs_names_loads_strictly(sharded, pipeline) -> None:
    directory, placed = sharded
    assert len(set(placed.values())) > 1
    with load_transformer(resolve(str(directory)), "cpu", torch.float32, Reference()) as flux:
        pass
    ours = dict(flux.slots())
    single = load_file(pipeline(DEV) / "transformer" / "diffusion_pytorch_model.safetensors")
    assert ours.keys() == single.keys()
    assert all(torch.equal(ours[name], single[name]) for name in single)


def test_a_shard_without_a_tensor_of_the_real_index_is_refused_by_name(sharded) -> None:
    directory, placed = sharded
    name = "single_transformer_blocks.2.proj_out.weight"
    path = directory / "transformer" / placed[name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with (
        pytest.raises(ModelError, match=name),
        load_transformer(resolve(str(directory)), "cpu", torch.float32, Reference()),
    ):
        pass
