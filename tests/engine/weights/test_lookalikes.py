"""Checkpoints as they are in the wild: saved over, converted, merged from others' parts. What the libraries read is
read, to the same tensors."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fluxcli.core.errors import ModelError
from fluxcli.engine.denoise import Schedule
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.weights import fill
from fluxcli.models.checkpoints import resolve
from fluxcli.models.tokenizers import Tokenizers
from tests.engine.weights.test_fill import DEVICES
from tests.models.conftest import WEIGHTS, edit, rewrite, shard
from tests.pipelines import DEV

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(pipeline: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline(DEV), tmp_path / "model"))


def transformer(model: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensors:
    with fill.load_transformer(resolve(str(model)), device, dtype, Reference()) as flux:
        pass
    return {name: slot.cpu() for name, slot in flux.slots()}


def part(model: Path, name: str) -> Any:
    return fill.load_part(resolve(str(model)), name, "cpu", torch.float32)


def same(made: Tensors, expected: Tensors) -> bool:
    return made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in expected)


@pytest.mark.parametrize("first", ["single", "sharded"])
def test_a_transformer_saved_over_another_is_the_one_that_diffusers_reads(model: Path, first: str) -> None:
    from diffusers import FluxTransformer2DModel

    folder = model / "transformer"
    saved = FluxTransformer2DModel.from_pretrained(folder)
    if first == "sharded":
        shutil.rmtree(folder)
        saved.save_pretrained(folder, max_shard_size="200KB")
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.mul_(0.7)
    saved.save_pretrained(folder, max_shard_size="200KB" if first == "single" else "10GB")
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert (folder / "diffusion_pytorch_model.safetensors").exists()
    assert same(transformer(model), saved.state_dict())


def test_a_text_encoder_saved_over_another_is_the_one_that_transformers_reads(model: Path) -> None:
    from transformers import T5EncoderModel

    file = model / "text_encoder_2" / WEIGHTS["text_encoder_2"]
    old = file.read_bytes()
    shard(file)
    for path in file.parent.glob("*-of-*"):
        rewrite(path, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    file.write_bytes(old)
    assert same(part(model, "text_encoder_2").state_dict(), T5EncoderModel.from_pretrained(file.parent).state_dict())


def test_the_only_variant_is_read(model: Path) -> None:
    expected = transformer(model)
    for name, file in WEIGHTS.items():
        path = model / name / file
        path.rename(path.with_name(file.replace(".safetensors", ".bf16.safetensors")))
    assert same(transformer(model), expected)
    folder = model / "transformer"
    index = shard(folder / "diffusion_pytorch_model.bf16.safetensors", stem="diffusion_pytorch_model.bf16")
    index.rename(folder / "diffusion_pytorch_model.safetensors.index.bf16.json")
    assert same(transformer(model), expected)
    for name in ("text_encoder", "text_encoder_2", "vae"):
        part(model, name)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_float8_without_scales_is_read(model: Path, stored: torch.dtype, dtype: torch.dtype, device: str) -> None:
    path = model / "transformer" / WEIGHTS["transformer"]
    expected = {name: tensor.to(stored).to(dtype) for name, tensor in load_file(path).items()}
    rewrite(path, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    assert same(transformer(model, dtype, device), expected)
    path = model / "text_encoder_2" / WEIGHTS["text_encoder_2"]
    rewrite(path, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    made, tensors = part(model, "text_encoder_2").state_dict(), load_file(path)
    assert all(torch.equal(made[name], tensor.float()) for name, tensor in tensors.items())


def prefixed(tensors: Tensors) -> Tensors:
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


CLIPS: dict[str, Callable[[Tensors], Tensors]] = {
    "with its projection": lambda tensors: {**tensors, "text_projection.weight": torch.randn(40, 40)},
    "a whole CLIP": lambda tensors: {
        **prefixed(tensors),
        "logit_scale": torch.ones(()),
        "text_projection.weight": torch.randn(40, 40),
        "visual_projection.weight": torch.randn(40, 40),
        "vision_model.embeddings.class_embedding": torch.randn(40),
    },
}


@pytest.mark.parametrize("case", CLIPS)
@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_of_a_clip_only_what_flux_reads_is_taken(model: Path, case: str, name: str) -> None:
    ids = torch.arange(77)[None]
    expected = part(model, "text_encoder")(ids).pooler_output
    rewrite(model / "text_encoder" / WEIGHTS["text_encoder"], CLIPS[case])
    edit(model / "model_index.json", text_encoder=["transformers", name])
    assert torch.equal(part(model, "text_encoder")(ids).pooler_output, expected)


def test_the_config_of_a_whole_clip_has_its_text_half(model: Path) -> None:
    path = model / "text_encoder" / "config.json"
    expected = part(model, "text_encoder").state_dict()
    path.write_text(f'{{"model_type": "clip", "projection_dim": 40, "text_config": {path.read_text()}}}')
    assert same(part(model, "text_encoder").state_dict(), expected)


def test_of_a_whole_t5_the_decoder_is_left(model: Path) -> None:
    expected = part(model, "text_encoder_2").state_dict()
    extra = {"lm_head.weight": torch.randn(9, 48), "decoder.embed_tokens.weight": torch.randn(9, 48)}
    rewrite(model / "text_encoder_2" / WEIGHTS["text_encoder_2"], lambda tensors: tensors | extra)
    assert same(part(model, "text_encoder_2").state_dict(), expected)
    bytes_ = fill.size(resolve(str(model)), "text_encoder_2", torch.float32)
    assert bytes_ == sum(parameter.nbytes for parameter in part(model, "text_encoder_2").parameters())


def test_a_vae_needs_no_encoder_and_may_bring_its_loss(model: Path) -> None:
    latents = torch.randn(1, 16, 4, 4)
    expected = part(model, "vae").decode(latents).sample
    rewrite(
        model / "vae" / WEIGHTS["vae"],
        lambda tensors: (
            {name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.")}
            | {"loss.logvar": torch.zeros(1)}
        ),
    )
    assert torch.equal(part(model, "vae").decode(latents).sample, expected)


def test_a_surplus_name_beside_a_missing_one_tells_why(model: Path) -> None:
    path = model / "transformer" / WEIGHTS["transformer"]
    rewrite(path, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(ModelError, match=r"missing: context_embedder\.bias.* \(and it has _orig_mod\.context_embedder"):
        transformer(model)


def test_a_name_from_a_file_reaches_no_terminal_raw(model: Path) -> None:
    rewrite(model / "transformer" / WEIGHTS["transformer"], lambda tensors: tensors | {"\x1b]0;x\x07": torch.ones(1)})
    with pytest.raises(ModelError, match=r"surplus: \\x1b\]0;x\\x07$"):
        transformer(model)


def test_a_config_says_nothing_of_whose_code_is_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention named `owner/kernel` is one that transformers would fetch from the hub."""
    from transformers.integrations import hub_kernels

    def fetched(*args: object, **kwargs: object) -> None:
        raise AssertionError("a kernel is fetched")

    for name in ("load_and_register_attn_kernel", "get_kernel", "lazy_load_kernel"):
        monkeypatch.setattr(hub_kernels, name, fetched, raising=False)
    keys = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_experts_implementation")
    keys += ("experts_implementation", "_experts_implementation_internal", "kernel_config")
    expected = part(model, "text_encoder").config._attn_implementation
    for name in ("text_encoder", "text_encoder_2", "vae"):
        auto_map = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
        edit(model / name / "config.json", auto_map=auto_map, **dict.fromkeys(keys, "attacker/kernel"))
    for name in ("text_encoder", "text_encoder_2"):
        config = part(model, name).config
        assert config._attn_implementation == expected
        assert "attacker" not in str(config.to_dict()) and not hasattr(config, "auto_map")
    assert "attacker" not in str(dict(part(model, "vae").config))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("transformer", {"attention_head_dim": 2**21, "axes_dims_rope": [2**20, 2**20], "num_attention_heads": 2**20}),
        ("text_encoder_2", {"d_model": 2**24, "vocab_size": 2**24}),
        ("text_encoder", {"hidden_size": 2**24, "intermediate_size": 2**24}),
        ("vae", {"block_out_channels": [2**20] * 4}),
    ],
)  # fmt: skip
def test_what_no_machine_can_build_is_told_in_a_line(model: Path, name: str, changes: dict[str, Any]) -> None:
    edit(model / name / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"{name}/config\.json: cannot be built"):
        transformer(model) if name == "transformer" else part(model, name)


class Payload:
    """Runs `Path.touch` where it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._ran,)


PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "training_args.bin", "model.pt", "model.ckpt")


def test_a_directory_full_of_pickles_and_code_runs_none_of_it_and_asks_nobody(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded whole, as a job loads it, with every socket closed."""
    ran, index = tmp_path / "ran", json.loads((model / "model_index.json").read_text())

    def connect(*args: object) -> None:
        raise AssertionError("a model directory reaches for the network")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    auto_map = {each: "evil.Evil" for each in ("AutoModel", "AutoConfig", "AutoTokenizer")}
    for folder in (model, *(model / name for name in index if (model / name).is_dir())):
        (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n")
        for name in PICKLES:
            (folder / name).write_bytes(pickle.dumps(Payload(ran)))
        for config in folder.glob("*config.json"):
            if folder.name != "transformer":
                edit(config, auto_map=auto_map, trust_remote_code=True)
    before = transformer(model)
    for name in ("text_encoder", "text_encoder_2", "vae"):
        part(model, name)
    Tokenizers(model).count(["a prompt"])
    Schedule(model / "scheduler")(4, 16)
    resolve(str(model)).fingerprint()
    assert same(transformer(model), before)
    weights = model / "transformer" / WEIGHTS["transformer"]
    weights.write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ModelError, match=r"cannot be read: it is a pickle under another name"):
        resolve(str(model))
    weights.unlink()
    with pytest.raises(ModelError, match=r"transformer: has neither .* is not read: such files can run code"):
        resolve(str(model))
    assert not ran.exists() and "evil" not in sys.modules
