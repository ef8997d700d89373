"""Adapter files as they may come: every key is understood or refused by its name, before anything is loaded."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fluxcli.core.errors import ModelError
from fluxcli.models.checkpoints import resolve
from tests.adapters import FORMATS, TEXT_FORMATS, Maker
from tests.pipelines import DEV, Shape

Q = "transformer.transformer_blocks.0.attn.to_q"
WIDTH = 96  # of the small pipeline


@pytest.fixture
def refusal(pipeline, tmp_path: Path) -> Callable[..., str]:
    """The message for a file of these tensors, or these bytes."""
    catalog = resolve(str(pipeline(DEV))).adapters

    def refuse(given: dict[str, Tensor] | bytes, name: str = "a.safetensors") -> str:
        path = tmp_path / name
        if isinstance(given, bytes):
            path.write_bytes(given)
        else:
            save_file(given, path)
        with pytest.raises(ModelError) as error:
            catalog.adapter(str(path))
        assert str(error.value).startswith(f"{path}: ")
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    return refuse


def pair(name: str = Q, rank: int = 4, width: int = WIDTH) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(rank, width), f"{name}.lora_B.weight": torch.ones(width, rank)}


@pytest.mark.parametrize("name", [*FORMATS, *TEXT_FORMATS])
def test_every_tensor_of_every_format_is_used(name: str, pipeline, tmp_path: Path) -> None:
    catalog = resolve(str(pipeline(DEV))).adapters
    made = (FORMATS | TEXT_FORMATS)[name](Maker(pipeline(DEV)))
    changes = catalog.changes(made.write(tmp_path / "a.safetensors"))
    used = {entry.name for change in changes for entry in change.tensors.values()}
    assert made.tensors.keys() - used == {key for key in made.tensors if key.endswith(".alpha")}
    names = {(change.target.part, f"{layer}.weight") for change in changes for layer in change.target.layers}
    assert {(part, name.removeprefix("text_model.")) for part, name in made.differences} == names


@pytest.mark.parametrize(
    "layer",
    [
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te_text_model_encoder_layers_1_self_attn_out_proj",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.v_proj",
    ],
)
def test_clips_layers_may_have_a_level_that_its_class_lacks(layer: str, pipeline, tmp_path: Path) -> None:
    save_file(pair(layer, width=DEV.clip_width), tmp_path / "a.safetensors")
    (change,) = resolve(str(pipeline(DEV))).adapters.changes(tmp_path / "a.safetensors")
    assert change.target.part == "text_encoder" and change.target.layers[0].startswith("encoder.layers.")


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight",  # SDXL's
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "transformer.transformer_blocks.17.attn.to_q.lora_A.weight",  # of a model with more blocks
        "lora_unet_double_blocks_17_img_mlp_0.lora_down.weight",
        "transformer.transformer_blocks.0.attn.to_q.hada_w1_a",  # LoHa
        "transformer.transformer_blocks.0.attn.to_q.lokr_t2",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.bias",
        "transformer.transformer_blocks.0.attn.to_qkv.lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.set_weight",
        "text_encoder.text_model.embeddings.token_embedding.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",  # a language model's
        "transformer_blocks.0.attn.to_q.weight",  # a checkpoint
        "lora_A.weight",
        ".alpha",
        "",
        "a\x1b[31m\nb",
    ],
)
def test_a_key_that_names_nothing_is_told(refusal, key: str) -> None:
    told = refusal({**pair(), key: torch.ones(4, WIDTH)})
    assert "names nothing that this model has and fluxcli knows" in told
    assert key[:40] in told or "\x1b" in key
    assert "\x1b" not in told


def test_the_first_and_the_number_of_them_are_told(refusal) -> None:
    unknown = {f"lora_unet_down_{n}.lora_down.weight": torch.ones(4, 4) for n in range(3)}
    assert ".lora_down.weight (and 2 more of 5 keys) names nothing" in refusal({**unknown, **pair()})


@pytest.mark.parametrize(
    "tensors",
    [
        {
            "transformer.x_embedder.lora_A.weight": torch.ones(4, 128),
            "transformer.x_embedder.lora_B.weight": torch.ones(WIDTH, 4),
        },
        {
            "img_in.lora_A.weight": torch.ones(4, 128),
            "img_in.lora_B.weight": torch.ones(WIDTH, 4),
            "img_in.lora_B.bias": torch.ones(WIDTH),
        },
        {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(32), **pair()},
    ],
)
def test_control_adapters_are_told_as_such(refusal, tensors: dict[str, Tensor]) -> None:
    assert "a control adapter (Canny, Depth, …), which needs a control image" in refusal(tensors)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (pair(width=64), f"to_q.lora_A.weight is [4, 64], expected [4, {WIDTH}]; the adapter is for another model"),
        (
            pair() | {f"{Q}.lora_B.weight": torch.ones(WIDTH, 3)},
            f"to_q.lora_B.weight is [{WIDTH}, 3], expected [{WIDTH}, 4]",
        ),
        (pair() | {f"{Q}.lora_B.weight": torch.ones(WIDTH, 4, 1, 1)}, f"is [{WIDTH}, 4, 1, 1], expected [{WIDTH}, 4]"),
        (pair(rank=2**14 + 1), "to_q.lora_A.weight has rank 16,385; fluxcli reads at most 16,384"),
        (pair(rank=0), "to_q.lora_A.weight is [0, 96], expected"),
        ({f"{Q}.lora_A.weight": torch.ones(4, WIDTH)}, "has down and no more; the file is incomplete"),
        ({f"{Q}.alpha": torch.ones(())}, "has alpha and no more; the file is incomplete"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(WIDTH)}, "has magnitude and no more"),
        (pair() | {f"{Q}.diff": torch.ones(WIDTH, WIDTH)}, "has diff, down, up and no more"),
        (pair() | {f"{Q}.alpha": torch.ones(2)}, "an alpha is one number"),
        (pair() | {f"{Q}.alpha": torch.tensor(float("nan"))}, "to_q.alpha is nan, and an alpha is a number"),
        (pair() | {f"{Q}.alpha": torch.tensor(True)}, "is BOOL []"),
        (
            pair() | {f"{Q}.lora_magnitude_vector": torch.ones(3)},
            f"is [3], expected [{WIDTH}] or [{WIDTH}, 1] or [1, {WIDTH}]",
        ),
        (pair() | {f"{Q}.lora_B.default.weight": torch.ones(WIDTH, 4)}, "is given twice (as"),
        (pair() | {f"{Q}.lora_A.weight": torch.ones(4, WIDTH).to(torch.int8)}, "is I8; fluxcli reads F64, F32"),
        ({f"{Q}.diff": torch.ones(WIDTH)}, f"is [{WIDTH}], expected [{WIDTH}, {WIDTH}]"),
        ({f"{Q}.diff_b": torch.ones(WIDTH, 1)}, f"is [{WIDTH}, 1], expected [{WIDTH}]"),
        (
            {"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.diff_b": torch.ones(48)},
            "has no bias in this model",
        ),
        (pair("transformer.transformer_blocks.0.attn.norm_q", width=32), "is [4, 32], expected [4, 0]"),
        (
            {f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2": torch.ones(4, 4)},
            f"makes [16, 16], expected [{WIDTH}, {WIDTH}]",
        ),
        ({f"{Q}.lokr_w1": torch.ones(4, 4, 1), f"{Q}.lokr_w2": torch.ones(24, 24)}, "is [4, 4, 1], expected a matrix"),
        ({f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2_a": torch.ones(24, 2)}, "has lokr_w1"),
        (
            {
                f"{Q}.lokr_w1": torch.ones(4, 4),
                f"{Q}.lokr_w2_a": torch.ones(24, 2),
                f"{Q}.lokr_w2_b": torch.ones(3, 24),
            },
            "is [3, 24], expected [2, 24]",
        ),
        ({}, "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_told(refusal, tensors: dict[str, Tensor], told: str) -> None:
    message = refusal(tensors)
    assert told.replace("lokr_w1", "w1") in message or told in message


def forged(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"<!doctype html><html>", "it is a web page"),
        (b"PK\x03\x04" + b"\0" * 60, "it is a pickle under another name"),
        (b"GGUF" + b"\x03\0\0\0" * 8, "it is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (struct.pack("<Q", 2**60), "is not that of a safetensors file"),
        (forged(b"[" * 100_000), "nested too deeply"),
        (forged(b"[1]"), "must hold a JSON object"),
        (
            forged({f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [4, WIDTH], "data_offsets": [0, 2**50]}}),
            "broke off",
        ),
        (
            forged({f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [4, -1], "data_offsets": [0, 0]}}),
            "nothing sensible",
        ),
        # A shape whose bytes the file does not have must not be made memory of.
        (
            forged({f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [2**40, WIDTH], "data_offsets": [0, 4]}}, b"1234"),
            "has not the bytes of its shape",
        ),
        (
            forged({f"{Q}.alpha": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}, b"1" * 400),
            "an alpha is one number",
        ),
        (
            forged(
                {
                    "__metadata__": {"lora_adapter_metadata": "[" * 100_000},
                    f"{Q}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
                },
                b"1234",
            ),
            "nested too deeply",
        ),
    ],
)
def test_forged_files_are_told(refusal, data: bytes, told: str) -> None:
    assert told in refusal(data)


def test_places_that_are_no_files(pipeline, tmp_path: Path) -> None:
    catalog = resolve(str(pipeline(DEV))).adapters
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "gone")
    for name, told in (
        ("none.safetensors", "no such file; an adapter is a .safetensors file on this machine"),
        ("XLabs-AI/flux-RealismLora", "no such file"),
        ("link.safetensors", "no such file"),
        ("", "is a directory; name the .safetensors file in it"),
        ("pipe.safetensors", "is no regular file"),
        ("x" * 300, "cannot be read"),
    ):
        with pytest.raises(ModelError, match=told):
            catalog.adapter(str(tmp_path / name))
    for path, told in (
        ("/dev/zero", "is no regular file"),
        ("/", "is a directory"),
        ("~nobody-of-this-name/a", "no such file"),
        ("\ud800", "cannot be read"),
        ("/proc/self/environ", "cannot be read"),
    ):
        with pytest.raises(ModelError, match=told):
            catalog.adapter(path)


def test_a_file_larger_than_any_adapter_is_not_read(refusal, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.truncate(2**34 + 1)
    with pytest.raises(ModelError, match="fluxcli reads adapters of at most"):
        resolve("tiny").adapters.adapter(str(path))


def test_a_file_is_read_once_whatever_names_it_how_often(pipeline, tmp_path: Path) -> None:
    catalog = resolve(str(pipeline(DEV))).adapters
    path = FORMATS["kohya"](Maker(pipeline(DEV))).write(tmp_path / "a.safetensors")
    first = catalog.adapter(str(path))
    path.unlink()
    assert catalog.adapter(str(path), 0.5).sha256 == first.sha256


def test_the_full_model_and_the_built_in_one_are_known_too(tmp_path: Path) -> None:
    """By configs alone: nothing has to be loaded."""
    save_file(pair(width=3072), tmp_path / "full.safetensors")
    save_file(pair(width=128), tmp_path / "other.safetensors")
    for name in ("random:flux-dev", "random:flux-schnell"):
        catalog = resolve(name).adapters
        assert catalog.adapter(str(tmp_path / "full.safetensors")).scale == 1.0
        with pytest.raises(ModelError, match=r"is \[4, 128\], expected \[4, 3072\]"):
            catalog.adapter(str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("shape", [DEV, Shape(heads=2, head_dim=16, axes=(4, 6, 6), dual=1, single=2)])
def test_targets_are_the_checkpoints_own_tensors(shape: Shape, pipeline) -> None:
    """Names and shapes, of every part, against its files."""
    from fluxcli.models.configs import read_config
    from fluxcli.models.flux1 import targets

    directory, checkpoint = pipeline(shape), resolve(str(pipeline(shape)))
    maker = Maker(directory)
    tables = {
        "transformer": targets.transformer(checkpoint.transformer),
        "text_encoder": targets.clip(read_config(directory / "text_encoder")),
        "text_encoder_2": targets.t5(read_config(directory / "text_encoder_2")),
    }
    for part, table in tables.items():
        weights = {name.removeprefix("text_model."): each for name, each in maker.weights[part].items()}
        for target in table.values():
            tensors = [weights[f"{layer}.weight"] for layer in target.layers]
            assert tuple(len(each) for each in tensors) == target.rows
            assert {each.shape[1] if each.ndim == 2 else 0 for each in tensors} == {target.columns}
            assert {f"{layer}.bias" in weights for layer in target.layers} == {target.bias}
        named = {layer for target in table.values() for layer in target.layers}
        assert named >= {name.removeprefix("text_model.") for name in maker.matrices(part)}
