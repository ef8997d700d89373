"""What the reader of weight files makes of them: the tensors that the libraries' own loaders make, whatever is packed,
tied, cut into pieces or stored in another dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.core.errors import ModelError
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.weights import copying, fill
from fluxcli.models.checkpoints import resolve
from tests.pipelines import DEV, build

PARTS = {"text_encoder": "model", "text_encoder_2": "model", "vae": "diffusion_pytorch_model"}


def from_pretrained(directory: Path, part: str, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    cls = {
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.T5EncoderModel,
        "vae": diffusers.AutoencoderKL,
    }[part]
    return cls.from_pretrained(directory / part, dtype=dtype)


def load(directory: Path, part: str, dtype: torch.dtype = torch.float32) -> Any:
    return fill.load_part(resolve(str(directory)), part, "cpu", dtype)


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_what_its_library_loads(pipeline, part: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(copying, "PIECE", 1000)
    ours, theirs = load(pipeline(DEV), part, dtype), from_pretrained(pipeline(DEV), part, dtype)
    if part == "vae":
        theirs.encoder = theirs.quant_conv = None  # nobody encodes
    for kind in ("named_parameters", "named_buffers"):
        made, expected = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (ours, theirs))
        assert made.keys() == expected.keys()
        for name, tensor in expected.items():
            assert made[name].dtype == tensor.dtype, name
            assert torch.equal(made[name], tensor), name
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(module.training for module in ours.modules())
    if part != "vae":
        assert ours.config._attn_implementation == theirs.config._attn_implementation


def test_tied_tensors_may_have_either_name_or_both(pipeline, tmp_path: Path) -> None:
    model = build(tmp_path / "model", DEV)
    file = model / "text_encoder_2" / "model.safetensors"
    expected = load_file(file)["shared.weight"]
    names = ("shared.weight", "encoder.embed_tokens.weight")
    for present in (names[1:], names):
        rewrite(file, lambda tensors, present=present: {
            **{name: tensor for name, tensor in tensors.items() if name not in names},
            **{name: expected.clone() for name in present},
        })  # fmt: skip
        made = load(model, "text_encoder_2")
        assert made.shared.weight is made.encoder.embed_tokens.weight
        assert torch.equal(made.shared.weight, expected)
    rewrite(file, lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names})
    with pytest.raises(ModelError, match=r"missing: encoder\.embed_tokens\.weight, shared\.weight"):
        load(model, "text_encoder_2")


def test_clips_names_may_have_their_old_level_and_its_computed_positions(tmp_path: Path) -> None:
    model = build(tmp_path / "model", DEV)
    file = model / "text_encoder" / "model.safetensors"
    plain = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    positions = {"embeddings.position_ids": torch.zeros(1, 77, dtype=torch.int64)}
    reference = from_pretrained(model, "text_encoder", torch.float32)
    for prefix in ("", "text_model."):
        rewrite(file, lambda _, prefix=prefix: {prefix + name: tensor for name, tensor in (plain | positions).items()})
        made = load(model, "text_encoder")
        ids = torch.arange(77)[None]
        assert torch.equal(made(ids).pooler_output, reference(ids).pooler_output)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_the_transformers_tensors_are_those_of_its_files_whatever_the_pieces(
    device: str, stored: torch.dtype, tmp_path: Path, monkeypatch
) -> None:
    model = build(tmp_path / "model", DEV, dtype=stored, shard_size="200KB")
    expected: dict[str, torch.Tensor] = {}
    for file in (model / "transformer").glob("*.safetensors"):
        expected |= load_file(file)
    for piece in (1000, 2**24):
        monkeypatch.setattr(copying, "PIECE", piece)
        with fill.load_transformer(resolve(str(model)), device, torch.bfloat16, Reference()) as flux:
            pass
        made = dict(flux.slots())
        assert made.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(made[name].cpu(), tensor.bfloat16()), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_whose_blocks_only_visit_has_the_same_tensors(device: str, pipeline) -> None:
    checkpoint = resolve(str(pipeline(DEV)))
    visiting = fill.load_part(checkpoint, "text_encoder_2", device, torch.float32, "encoder.block")
    theirs = from_pretrained(pipeline(DEV), "text_encoder_2", torch.float32)
    for name, tensor in theirs.state_dict().items():
        made = visiting.state_dict()[name]
        assert made.device.type == ("cpu" if ".block." in name else device), name
        assert torch.equal(made.cpu(), tensor), name


def test_a_quantised_tensor_is_refused_by_name(tmp_path: Path) -> None:
    model = build(tmp_path / "model", DEV)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    rewrite(file, lambda tensors: {**tensors, "proj_out.weight": tensors["proj_out.weight"].to(torch.int8)})
    refused = pytest.raises(ModelError, match=r"proj_out.weight is I8; fluxcli reads F64, F32")
    with refused, fill.load_transformer(resolve(str(model)), "cpu", torch.float32, Reference()):
        pass


def test_an_error_beside_the_reading_ends_it(pipeline) -> None:
    model = resolve(str(pipeline(DEV)))
    with pytest.raises(ZeroDivisionError), fill.load_transformer(model, "cpu", torch.float32, Reference()):
        raise ZeroDivisionError
