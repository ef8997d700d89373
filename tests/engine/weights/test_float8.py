"""Weights in 8 bits: made while a checkpoint is read, or taken as it holds them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fluxcli.core.errors import ModelError
from fluxcli.engine.matmul.scaled import Scaled, row_scaled
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.weights import copying, fill
from fluxcli.models.checkpoints import resolve
from tests.engine.weights.test_fill import DEVICES
from tests.models.conftest import WEIGHTS, rewrite, shard
from tests.pipelines import DEV

Tensors = dict[str, torch.Tensor]
Made = dict[str, torch.Tensor | Scaled]
LAYER = "transformer_blocks.0.attn.to_k"  # in the middle of a packed layer


@pytest.fixture
def model(pipeline: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline(DEV), tmp_path / "model"))


def file(model: Path) -> Path:
    return model / "transformer" / WEIGHTS["transformer"]


def transformer(model: Path, fp8: bool, device: str = "cpu") -> Made:
    with fill.load_transformer(resolve(str(model)), device, torch.float32, Reference(), fp8) as flux:
        pass
    return {name: slot.cpu() if isinstance(slot, torch.Tensor) else Scaled(*(each.cpu() for each in slot))
            for name, slot in flux.slots()}  # fmt: skip


def same(a: torch.Tensor | Scaled, b: torch.Tensor | Scaled) -> bool:
    if isinstance(a, Scaled) and isinstance(b, Scaled):
        return torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and torch.equal(a.scale, b.scale)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)


def matrices(tensors: Tensors) -> Tensors:
    """Those of the blocks' large layers."""
    return {
        name: tensor for name, tensor in tensors.items()
        if tensor.ndim == 2 and "transformer_blocks" in name and ".norm" not in name
    }  # fmt: skip


def stored_in_8_bits(model: Path, spelling: str = "weight_scale", per_row: bool = True) -> dict[str, Scaled]:
    """Rewrites the transformer's file as people have them, and returns what it then holds."""
    held: dict[str, Scaled] = {}

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in matrices(tensors).items():
            eight = row_scaled(tensor) if per_row else row_scaled(tensor.view(1, -1))
            values, scale = eight.values.view(tensor.shape), eight.scale
            held[name] = Scaled(values, scale.expand(len(tensor)).contiguous())
            layer = name.removesuffix(".weight")
            tensors[name] = values
            tensors[f"{layer}.{spelling}"] = scale[:, None].contiguous() if per_row else scale.clone()[0]
            if spelling == "scale_weight":
                tensors[f"{layer}.scale_input"] = torch.ones(())
        return tensors | (
            {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if spelling == "scale_weight" else {}
        )

    rewrite(file(model), change)
    return held


@pytest.mark.parametrize("device", DEVICES)
def test_weights_become_8_bits_while_they_are_read_whatever_the_pieces(device: str, model: Path, monkeypatch) -> None:
    tensors = load_file(file(model))
    for piece in (1000, 2**24):
        monkeypatch.setattr(copying, "PIECE", piece)
        made = transformer(model, True, device)
        assert made.keys() == tensors.keys()
        large = matrices(tensors).keys()
        for name, tensor in tensors.items():
            assert same(made[name], row_scaled(tensor) if name in large else tensor), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("per_row", [True, False], ids=["a scale a row", "a scale"])
def test_scaled_float8_is_taken_as_it_is(device: str, spelling: str, per_row: bool, model: Path) -> None:
    tensors = load_file(file(model))
    held = stored_in_8_bits(model, spelling, per_row)
    made = transformer(model, True, device)
    assert made.keys() == tensors.keys()
    assert all(same(made[name], held.get(name, tensors[name])) for name in tensors)
    widened = transformer(model, False, device)
    assert all(same(widened[name], held[name].wide() if name in held else tensors[name]) for name in tensors)


def test_float8_without_scales_has_scales_of_one(model: Path) -> None:
    rewrite(file(model), lambda tensors: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})
    tensors = load_file(file(model))
    made = transformer(model, True)
    for name, tensor in tensors.items():
        one = Scaled(tensor, torch.ones(len(tensor)))
        assert same(made[name], one if name in matrices(tensors) else tensor.float()), name


def test_a_scale_may_lie_in_another_file_than_its_weight(model: Path) -> None:
    held = stored_in_8_bits(model)
    index = shard(file(model))
    assert len(list(index.parent.glob("*-of-*"))) > 1
    made = transformer(model, True)
    assert all(same(made[name], held[name]) for name in held)


def test_a_text_encoder_in_scaled_float8(model: Path) -> None:
    path = model / "text_encoder_2" / WEIGHTS["text_encoder_2"]
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    eight = row_scaled(load_file(path)[name])
    scales = {name.replace(".weight", ".scale_weight"): eight.scale}
    rewrite(path, lambda tensors: {**tensors, name: eight.values, **scales})
    made = fill.load_part(resolve(str(model)), "text_encoder_2", "cpu", torch.float32).state_dict()
    assert torch.equal(made[name], eight.wide())


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "zero": (
        lambda tensors: tensors | {f"{LAYER}.weight_scale": torch.zeros(1)},
        r"attn.to_k.weight_scale holds 0, which is no scale",
    ),
    "negative": (
        lambda tensors: tensors | {f"{LAYER}.weight_scale": torch.full((96, 1), -0.5)},
        r"attn.to_k.weight_scale holds -0.5, which is no scale",
    ),
    "infinite": (
        lambda tensors: tensors | {f"{LAYER}.weight_scale": torch.tensor([torch.inf])},
        r"attn.to_k.weight_scale holds inf, which is no scale",
    ),
    "missing": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{LAYER}.weight_scale"},
        r"attn.to_k.weight is in float8 and has no scale, as other weights here have",
    ),
    "of other rows": (
        lambda tensors: tensors | {f"{LAYER}.weight_scale": torch.ones(7)},
        r"attn.to_k.weight_scale is F32 \[7\]; the scale of 96 rows is one number, or one for each",
    ),
    "not a float": (
        lambda tensors: tensors | {f"{LAYER}.weight_scale": torch.ones(1, dtype=torch.int32)},
        r"attn.to_k.weight_scale is I32 \[1\]",
    ),
    "of a layer that is not there": (
        lambda tensors: tensors | {"attn.weight_scale": torch.ones(1)},
        r"surplus: attn.weight_scale",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_scale_that_is_none_names_its_tensor(case: str, model: Path) -> None:
    change, message = WRONG[case]
    stored_in_8_bits(model)
    rewrite(file(model), change)
    with pytest.raises(ModelError, match=message) as refused:
        transformer(model, True)
    assert str(file(model).parent) in str(refused.value) and "\n" not in str(refused.value)


def test_made_up_weights_in_8_bits_are_those_in_the_models_dtype_made_smaller() -> None:
    from fluxcli.engine.weights.random import fill_random

    names = ("a.weight", "a.bias", "norm.weight")
    shapes = ((24, 32), (24,), (32,))
    whole = [torch.empty(shape) for shape in shapes]
    eight = [Scaled(torch.empty(24, 32, dtype=torch.float8_e4m3fn), torch.empty(24)), torch.empty(24), torch.empty(32)]
    for slots in (whole, eight):
        fill_random(zip(names, slots, strict=True), "cpu", torch.float32)
    assert same(eight[0], row_scaled(whole[0])) and same(eight[1], whole[1]) and same(eight[2], whole[2])
