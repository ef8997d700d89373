"""Which of several weight files is read: the one that the part's own package reads."""

import pytest

from fluxcli.core.errors import ModelError
from fluxcli.models.weight_files import WeightFile, choose

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
SHARDS = {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
SHARDED = [WeightFile(file, frozenset({name})) for name, file in SHARDS.items()]


def chosen(package: str, *names: str, placed: dict[str, str] = SHARDS) -> list[WeightFile]:
    return choose("part", names, package, lambda index: {"weight_map": placed})


@pytest.mark.parametrize("package", STEMS)
def test_what_is_there_alone_is_read(package: str) -> None:
    stem = STEMS[package]
    assert chosen(package, f"{stem}.safetensors", "config.json") == [WeightFile(f"{stem}.safetensors")]
    assert chosen(package, f"{stem}.safetensors.index.json", *SHARDS.values()) == SHARDED
    assert chosen(package, f"{stem}.fp16.safetensors") == [WeightFile(f"{stem}.fp16.safetensors")]
    assert chosen(package, f"{stem}.safetensors.index.bf16.json", *SHARDS.values()) == SHARDED


@pytest.mark.parametrize("package", STEMS)
def test_of_a_single_file_and_an_index_diffusers_reads_the_index_and_transformers_the_file(package: str) -> None:
    stem = STEMS[package]
    single = f"{stem}.safetensors"
    both = single, f"{single}.index.json", *SHARDS.values()
    assert chosen(package, *both) == (SHARDED if package == "diffusers" else [WeightFile(single)])


@pytest.mark.parametrize("package", STEMS)
def test_an_index_whose_shards_are_gone_gives_way_to_the_single_file(package: str) -> None:
    single = f"{STEMS[package]}.safetensors"
    assert chosen(package, single, f"{single}.index.json") == [WeightFile(single)]


def test_a_model_without_variant_wins_over_variants() -> None:
    names = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
    assert chosen("diffusers", *names) == [WeightFile(names[0])]


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a\\x.safetensors", "x.bin", "x\0.safetensors"])
def test_a_shard_lies_beside_its_index(file: str) -> None:
    with pytest.raises(ModelError, match="is no safetensors file of this folder"):
        chosen("diffusers", "diffusion_pytorch_model.safetensors.index.json", file, placed={"a": file})
