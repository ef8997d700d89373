"""Against the real thing, where it is at hand: FLUX.1's own configs, tokenizers and weight indexes, PartiPrompts."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fluxcli.core.config import TEXT_LENGTHS, RowDefaults
from fluxcli.core.errors import ModelError
from fluxcli.core.records import PromptRecord
from fluxcli.engine.nets.flux1 import Flux, FluxConfig
from fluxcli.engine.weights.fill import load_transformer
from fluxcli.job.input.intake import Intake, take_in
from fluxcli.job.input.read import PromptFile
from fluxcli.job.plan import padded_sizes, plan
from fluxcli.models.checkpoints import resolve
from fluxcli.models.tokenizers import Tokenizers
from tests import pipelines
from tests.conftest import read_rows
from tests.engine.test_parity import reference, worst
from tests.pipelines import DEV, PARTI, REAL_DEV, REAL_SCHNELL

pytestmark = pytest.mark.skipif(not pipelines.SHARED.is_dir(), reason="FLUX.1's files are not beside the project")
both = pytest.mark.parametrize("real", [REAL_DEV, REAL_SCHNELL], ids=["dev", "schnell"])
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def config_of(directory: Path) -> FluxConfig:
    return FluxConfig.from_json(json.loads((directory / "transformer" / "config.json").read_text()))


def weight_map(directory: Path) -> dict[str, str]:
    mapped: dict[str, str] = json.loads((directory / "transformer" / INDEX).read_text())["weight_map"]
    return mapped


# Configs and weights


@both
def test_the_real_configs_describe_flux(real: Path) -> None:
    config = config_of(real)
    assert (config.num_layers, config.num_single_layers) == (19, 38)
    assert (config.num_attention_heads, config.attention_head_dim, config.inner_dim) == (24, 128, 3072)
    assert config.guidance_embeds == (real == REAL_DEV)


@both
def test_the_denoiser_wants_exactly_the_tensors_of_the_real_index(real: Path) -> None:
    with torch.device("meta"):
        slots = list(Flux(config_of(real)).slots())
    names = [name for name, _ in slots]
    assert len(names) == len(set(names))
    assert set(names) == weight_map(real).keys()


def test_the_denoiser_has_the_real_number_of_parameters() -> None:
    with torch.device("meta"):
        slots = list(Flux(config_of(REAL_DEV)).slots())
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
    with load_transformer(resolve(str(directory)), "cpu", torch.float32) as flux:
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
    with pytest.raises(ModelError, match=name), load_transformer(resolve(str(directory)), "cpu", torch.float32):
        pass


# PartiPrompts


@pytest.fixture(scope="module")
def parti() -> list[dict[str, str]]:
    with PARTI.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def intake(pipeline) -> Iterator[Intake]:
    """PartiPrompts taken in with the real tokenizer."""
    source = PromptFile(str(PARTI))
    tokenizers = Tokenizers(pipeline(DEV, real=True))
    yield take_in(source, RowDefaults(1024, 1024, 28, 3.5), TEXT_LENGTHS, tokenizers.count)
    source.close()


def test_every_partiprompt_is_a_good_row(intake: Intake, parti: list[dict[str, str]]) -> None:
    assert not intake.failures
    records = intake.records(range(len(intake.groups)))
    assert len(records) == len(parti) == 1632
    assert [record.prompt for record in records] == [row["Prompt"] for row in parti]
    assert [record.meta["Category"] for record in records] == [row["Category"] for row in parti]


def test_the_real_tokenizer_counts_what_is_known_of_partiprompts(intake: Intake) -> None:
    counts = np.array([tokens for tokens, _ in intake.text_tokens()])
    assert (np.median(counts), np.percentile(counts, 95), counts.max()) == (11, 39, 105)


def test_partiprompts_fit_the_two_smallest_buckets(intake: Intake) -> None:
    for tokens, length in intake.text_tokens():
        assert length == (64 if tokens <= 64 else 128)
    assert intake.truncated == 0
    planned = plan(intake.groups, 16, padded_sizes(16))
    assert sorted(row for batch in planned for row in batch.rows) == list(range(1632))
    assert {key.text_length for key in planned.shapes()} == {64, 128}


def test_the_real_tokenizers_pad_and_cut_as_diffusers_does(pipeline) -> None:
    from transformers import AutoTokenizer

    directory = pipeline(DEV, real=True)
    tokenizers = Tokenizers(directory)
    prompts = ["a bench", "Ünïcödé 星 🐱", "word " * 600]
    for part, length, ours in (
        ("tokenizer_2", 64, tokenizers.t5(prompts, 64)),
        ("tokenizer_2", 512, tokenizers.t5(prompts, 512)),
        ("tokenizer", 77, tokenizers.clip(prompts)),
    ):
        theirs = AutoTokenizer.from_pretrained(directory / part)
        assert ours == theirs(prompts, padding="max_length", max_length=length, truncation=True).input_ids


@pytest.mark.slow
def test_a_job_over_200_partiprompts_joins_back_to_its_input_and_equals_diffusers(
    fluxcli, pipeline, parti: list[dict[str, str]], tmp_path: Path
) -> None:
    model = pipeline(DEV, real=True)
    options = ("--width", 64, "--height", 64, "--steps", 2, "--batch-size", 16, "--limit", 200)
    result = fluxcli("batch", PARTI, "-o", "out", "-m", model, *options)
    assert result.returncode == 0, result.stderr
    rows = {row["id"]: row for row in read_rows(tmp_path / "out" / "manifest.jsonl")}
    assert rows.keys() == {f"{index:06d}" for index in range(200)}
    made = []
    for row, given in ((rows[f"{index:06d}"], given) for index, given in enumerate(parti[:200])):
        assert {"Prompt": row["prompt"], **row["meta"]} == given
        made.append(np.asarray(Image.open(tmp_path / "out" / row["file_name"])))
    records = [
        PromptRecord(
            row["id"], row["prompt"], row["seed"], row["width"], row["height"], row["num_inference_steps"],
            row["guidance_scale"], 1, text_tokens=row["text_tokens"], text_length=row["text_length"],
        )
        for row in (rows[f"{index:06d}"] for index in range(200))
    ]  # fmt: skip
    theirs = reference(model, records)
    assert theirs.std() > 5, "flat pictures would prove nothing"
    assert worst(np.stack(made), theirs) <= 1
