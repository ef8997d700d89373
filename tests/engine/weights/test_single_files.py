"""Single files, in each layout that people have: the same pixels as the directory that they were made from, or as what
their bits stand for."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxcli.core.errors import ModelError
from fluxcli.engine.engine import Engine
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import Flux, FluxConfig
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.weights import copying, fill, sources
from fluxcli.models import checkpoints
from fluxcli.models.checkpoints import resolve
from fluxcli.models.flux1.family import FLUX1
from fluxcli.models.flux1.names import TABLES
from fluxcli.models.single_files import weights_in
from tests import single_files
from tests.engine.test_parity import records, run
from tests.engine.weights.test_fill import DEVICES
from tests.models.conftest import WEIGHTS, edit
from tests.pipelines import DEV, SCHNELL, Shape
from tests.single_files import Tensors, all_in_one, bfl, gguf, save, tensors

Pipeline = Callable[..., Path]


def drawn(model: str | Path, files: Mapping[str, Path] | None = None, shape: Shape = DEV) -> np.ndarray:
    engine = Engine(resolve(str(model), files=files), resolve_device("cpu", "float32", None, "auto"))
    return run(engine, records(shape, 2, 64, 64, 64, steps=2))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    assert one.std() > 5, "a flat picture would prove nothing"
    return bool((one == other).all())


def all_of(file: Path) -> dict[str, Path]:
    return dict.fromkeys(checkpoints.FILE_PARTS, file)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("shape", [DEV, SCHNELL], ids=lambda shape: shape.name)
def test_a_transformer_in_black_forest_labs_names(
    pipeline: Pipeline, tmp_path: Path, shape: Shape, prefix: str
) -> None:
    model = pipeline(shape)
    file = save(tmp_path / "flux1.safetensors", bfl(tensors(model, "transformer")), prefix)
    assert same(drawn(model, {"transformer": file}, shape), drawn(model, shape=shape))


def test_norms_as_comfyui_saves_them(pipeline: Pipeline, tmp_path: Path) -> None:
    model = pipeline(DEV)
    given = {
        name.replace("_norm.scale", "_norm.weight"): each for name, each in bfl(tensors(model, "transformer")).items()
    }
    assert same(drawn(model, {"transformer": save(tmp_path / "x.safetensors", given)}), drawn(model))


def clip_l(given: Tensors) -> Tensors:
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in given.items()}
    return {**text, "text_projection.weight": torch.randn(40, 40), "logit_scale": torch.ones(())}


PARTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "diffusers' own names": ("transformer", lambda given: given),
    "ae": ("vae", single_files.ae),
    "a VAE in diffusers' names": ("vae", lambda given: given),
    "clip_l": ("text_encoder", clip_l),
    "t5xxl": ("text_encoder_2", lambda given: {**given, "spiece_model": torch.zeros(9, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_alone(pipeline: Pipeline, tmp_path: Path, case: str) -> None:
    model, (part, change) = pipeline(DEV), PARTS[case]
    file = save(tmp_path / "part.safetensors", change(tensors(model, part)))
    other = Path(shutil.copytree(model, tmp_path / "other"))  # that it is read, and not the directory's
    (other / part / WEIGHTS[part]).unlink()
    assert same(drawn(other, {part: file}), drawn(model))


def test_the_vaes_names_are_those_of_diffusers_converter(pipeline: Pipeline) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = pipeline(DEV)
    config = fill.load_part(resolve(str(model)), "vae", "cpu", torch.float32).config
    given = tensors(model, "vae")
    made = convert_ldm_vae_checkpoint(single_files.ae(given), config)
    assert made.keys() == given.keys()
    assert all(torch.equal(made[name].reshape(tensor.shape), tensor) for name, tensor in given.items())


def test_a_file_of_all_parts(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a directory, and alone with configs and tokenizers that fluxcli brings: here a small model's."""
    model = pipeline(DEV)
    file = all_in_one(model, tmp_path / "flux1-dev.safetensors")
    expected = drawn(model)
    assert same(drawn(model, all_of(file)), expected)
    built_in = tmp_path / "built-in" / "flux-dev"
    shutil.copytree(model, built_in, ignore=lambda folder, names: [name for name in names if "safetensors" in name])
    monkeypatch.setattr(checkpoints, "BUILT_IN", built_in.parent)
    checkpoint = resolve(str(file))
    assert checkpoint.label == "flux1-dev.safetensors" and checkpoint.takes_guidance
    assert same(drawn(file), expected)


def test_a_file_without_guidance_alone_has_schnells_schedule(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = pipeline(SCHNELL), pipeline(DEV)
    file = all_in_one(model, tmp_path / "flux1-schnell.safetensors")
    built_in = tmp_path / "built-in"
    shutil.copytree(
        model, built_in / "flux-dev", ignore=lambda folder, names: [each for each in names if "safetensors" in each]
    )
    for name, source in (("flux-dev", other), ("flux-schnell", model)):
        shutil.copytree(source / "scheduler", built_in / name / "scheduler", dirs_exist_ok=True)
    monkeypatch.setattr(checkpoints, "BUILT_IN", built_in)
    assert resolve(str(file)).row_defaults().num_inference_steps == 4
    assert same(drawn(file, shape=SCHNELL), drawn(model, shape=SCHNELL))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_a_file_of_all_parts_in_few_bits(pipeline: Pipeline, tmp_path: Path, stored: torch.dtype) -> None:
    model = pipeline(DEV)

    def rounded(given: Tensors) -> Tensors:
        return {name: tensor.to(stored) for name, tensor in given.items()}

    def wide(given: Tensors) -> Tensors:
        return {name: tensor.to(stored).float() for name, tensor in given.items()}

    few = all_in_one(model, tmp_path / "few.safetensors", rounded)
    whole = all_in_one(model, tmp_path / "wide.safetensors", wide)
    assert same(drawn(model, all_of(few)), drawn(model, all_of(whole)))


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_scaled_float8(pipeline: Pipeline, tmp_path: Path, scale: str) -> None:
    model = pipeline(DEV)
    few = all_in_one(model, tmp_path / "few.safetensors", lambda given: single_files.scaled(given, scale))
    whole = all_in_one(model, tmp_path / "wide.safetensors", single_files.unscaled)
    assert same(drawn(model, all_of(few)), drawn(model, all_of(whole)))


def test_comfys_word_on_a_float8_layer_is_passed_over(pipeline: Pipeline, tmp_path: Path) -> None:
    model = pipeline(DEV)
    scaled = single_files.scaled(bfl(tensors(model, "transformer")), "weight_scale")
    about = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    one = save(tmp_path / "one.safetensors", scaled)
    two = save(tmp_path / "two.safetensors", scaled | {"double_blocks.0.img_attn.qkv.comfy_quant": about})
    assert same(drawn(model, {"transformer": two}), drawn(model, {"transformer": one}))


def test_scaled_float8_is_kept_bit_by_bit_under_fp8(pipeline: Pipeline, tmp_path: Path) -> None:
    model = pipeline(DEV)
    given = single_files.scaled(bfl(tensors(model, "transformer")))
    checkpoint = resolve(str(model), files={"transformer": save(tmp_path / "x.safetensors", given)})
    with fill.load_transformer(checkpoint, "cpu", torch.bfloat16, Reference(), fp8=True) as flux:
        pass
    for layer in ("double_blocks.1.txt_attn.qkv", "single_blocks.2.linear1"):
        ours = flux.get_submodule(layer)
        assert torch.equal(ours.weight.view(torch.uint8), given[f"{layer}.weight"].view(torch.uint8))
        assert (ours.scale == given[f"{layer}.scale_weight"]).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16", "BF16"])
def test_a_gguf_is_what_its_bits_stand_for(pipeline: Pipeline, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf")
    model = pipeline(DEV)
    given = bfl(tensors(model, "transformer"))
    few = gguf(tmp_path / "few.gguf", given, kind)
    whole = save(tmp_path / "wide.safetensors", single_files.dequantized(given, kind))
    assert same(drawn(model, {"transformer": few}), drawn(model, {"transformer": whole}))


def test_a_gguf_of_t5(pipeline: Pipeline, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = pipeline(DEV)
    given = single_files.llama(tensors(model, "text_encoder_2"))
    few = gguf(tmp_path / "few.gguf", given, "Q8_0")
    plain = gguf(tmp_path / "plain.gguf", single_files.dequantized(given, "Q8_0"), "F32")
    exact = gguf(tmp_path / "exact.gguf", given, "F32")
    assert same(drawn(model, {"text_encoder_2": few}), drawn(model, {"text_encoder_2": plain}))
    assert same(drawn(model, {"text_encoder_2": exact}), drawn(model))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", [False, True])
def test_a_gguf_is_copied_in_pieces(
    pipeline: Pipeline, tmp_path: Path, device: str, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    model = pipeline(DEV)
    given = bfl(tensors(model, "transformer"))
    file = gguf(tmp_path / "few.gguf", given, "Q8_0")
    checkpoint = resolve(str(model), files={"transformer": file})
    made = []
    for piece in (1000, copying.PIECE):
        monkeypatch.setattr(copying, "PIECE", piece)
        with fill.load_transformer(checkpoint, device, torch.bfloat16, Reference(), fp8) as flux:
            pass
        made.append([parameter.cpu() for parameter in flux.parameters()])
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(*made, strict=True))


def test_a_file_says_how_many_blocks_there_are_and_whether_it_takes_guidance(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Lite and Flex.1 have fewer blocks than FLUX.1-dev, whose directory they are given over; schnell takes none."""
    other, model = pipeline(SCHNELL), Path(shutil.copytree(pipeline(DEV), tmp_path / "model"))
    file = save(tmp_path / "x.safetensors", bfl(tensors(model, "transformer")))
    expected = drawn(model)
    edit(model / "transformer" / "config.json", num_layers=19, num_single_layers=38, guidance_embeds=False)
    assert same(drawn(model, {"transformer": file}), expected)
    schnell = save(tmp_path / "y.safetensors", bfl(tensors(other, "transformer")))
    assert not resolve(str(model), files={"transformer": schnell}).takes_guidance


def test_a_file_is_held_against_a_model_without_memory(pipeline: Pipeline, tmp_path: Path) -> None:
    """As those do who want some of its tensors alone."""
    model = pipeline(DEV)
    file = save(tmp_path / "x.safetensors", bfl(tensors(model, "transformer")))
    checkpoint = resolve(str(model), files={"transformer": file})
    with torch.device("meta"):
        flux = Flux(FluxConfig.from_json(checkpoint.transformer), Reference())
    with sources.paired(flux.slots(TABLES["bfl"]), checkpoint.weights("transformer")) as pairs:
        assert len(pairs) == len(list(flux.slots(TABLES["bfl"])))
    lacking = save(tmp_path / "y.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.ones(288, 96)})
    with (
        pytest.raises(ModelError, match=r"missing: double_blocks\.0\.img_attn\.norm\.key_norm\.scale"),
        sources.paired(
            flux.slots(TABLES["bfl"]),
            weights_in(model, "transformer", FLUX1.parts["transformer"], {"transformer": lacking}),
        ),
    ):
        pass


@pytest.mark.parametrize(("part", "name"), [("transformer", "img_in.bias"), ("vae", "decoder.conv_in.bias")])
def test_strict_by_name(pipeline: Pipeline, tmp_path: Path, part: str, name: str) -> None:
    model = pipeline(DEV)
    given = {"transformer": bfl, "vae": single_files.ae}[part](tensors(model, part))
    whole = save(tmp_path / "whole.safetensors", {**given, "decoder.foo": torch.ones(1), "img_in.foo": torch.ones(1)})
    lacking = save(tmp_path / "lacking.safetensors", {key: tensor for key, tensor in given.items() if key != name})
    with pytest.raises(ModelError, match=r"whole\.safetensors: surplus: decoder\.foo"):
        drawn(model, {part: whole})
    with pytest.raises(ModelError, match=rf"lacking\.safetensors: missing: {name}"):
        drawn(model, {part: lacking})


def test_its_size_is_counted(pipeline: Pipeline, tmp_path: Path) -> None:
    model = pipeline(DEV)
    file = all_in_one(model, tmp_path / "x.safetensors")
    for part in checkpoints.FILE_PARTS:
        sizes = [fill.size(resolve(str(model), files=files), part, torch.bfloat16) for files in (None, all_of(file))]
        assert sizes[0] == sizes[1], part
