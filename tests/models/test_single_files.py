"""Files that are given as a model or as a part of one: what they hold is found, and what they are instead is told in a
line, before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fluxcli.core.errors import ModelError
from fluxcli.engine.matmul.torch_ import Reference
from fluxcli.engine.nets.flux1 import Flux, FluxConfig
from fluxcli.models.checkpoints import BUILT_IN, FILE_PARTS, resolve
from fluxcli.models.flux1.names import bfl as table
from fluxcli.models.tokenizers import Tokenizers
from tests.models.conftest import WEIGHTS, edit
from tests.single_files import Tensors, ae, all_in_one, bfl, save, scaled, tensors

Change = Callable[[Tensors], Tensors]


def renamed(old: str, new: str) -> Change:
    return lambda given: {name.replace(old, new): tensor for name, tensor in given.items()}


def with_names(*names: str) -> Change:
    return lambda given: {**given, **{name: torch.ones(4, 4) for name in names}}


def only(*names: str) -> Change:
    return lambda given: {name: torch.ones(4, 4) for name in names}


def nf4(given: Tensors) -> Tensors:
    matrices = {name for name, tensor in given.items() if tensor.ndim == 2 and "blocks" in name}
    packed = {name: torch.zeros(given[name].numel() // 2, 1, dtype=torch.uint8) for name in matrices}
    return {**given, **packed, **{f"{name}.absmax": torch.ones(4) for name in matrices}}


def fill(given: Tensors) -> Tensors:
    return {**given, "img_in.weight": torch.zeros(given["img_in.weight"].shape[0], 384)}


# Of a transformer in Black Forest Labs' names.
FILES: dict[str, tuple[Change, str]] = {
    "nf4": (nf4, r"\.absmax: the weights are quantised \(bitsandbytes\); fluxcli needs the original ones"),
    "quanto": (with_names("double_blocks.0.img_mlp.0.weight._data"), r"quantised \(optimum-quanto\)"),
    "torchao": (with_names("double_blocks.0.img_mlp.0.weight:_weight_qdata"), r"quantised \(torchao\)"),
    "nunchaku": (
        only("transformer_blocks.0.qkv_proj.qweight", "transformer_blocks.0.qkv_proj.wscales"),
        r"it is a nunchaku file \(SVDQuant\): its weights are quantised",
    ),
    "a LoRA": (only("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), r"it is a LoRA, or its like"),
    "a LoRA in BFL's names": (only("double_blocks.0.img_attn.qkv.lora_A.weight"), r"it is a LoRA, or its like"),
    "Chroma": (with_names("distilled_guidance_layer.in_proj.weight"), r"is Chroma, which is no FLUX\.1"),
    "FLUX.2": (with_names("double_stream_modulation_img.lin.weight"), r"is FLUX\.2"),
    "Stable Diffusion": (
        only("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),
        r"it is a Stable Diffusion model of another architecture",
    ),
    "Stable Diffusion 3": (only("model.diffusion_model.joint_blocks.0.x.weight"), r"it is Stable Diffusion 3"),
    "Fill": (fill, r"takes 384 channels and makes 64: FLUX\.1 Fill, a control model or their like"),
    "2,000 blocks": (
        with_names(*(f"double_blocks.{block}.x" for block in range(2000))),
        r"file\.safetensors: num_layers is 2000; fluxcli builds at most 1000",
    ),
    "something": (only("a", "b"), r"it is none that fluxcli knows, with a, b$"),
    "nothing": (lambda given: {}, r"it is an empty one"),
    "names that no terminal may see": (only("\x1b]0;x\x07"), r"with \\x1b\]0;x\\x07$"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_flux1_is_told_for_what_it_is(model: Path, tmp_path: Path, case: str) -> None:
    change, message = FILES[case]
    file = save(tmp_path / "file.safetensors", change(bfl(tensors(model, "transformer"))))
    for name, files in ((str(model), {"transformer": file}), (str(file), {})):
        if files or case != "Fill":  # which is told by its config, when all parts are there
            with pytest.raises(ModelError, match=message) as refused:
                resolve(name, files=files)
        assert len(str(refused.value).splitlines()) == 1 and str(refused.value).isprintable()


OPTIONS: dict[str, tuple[str, str]] = {
    "gone.safetensors": ("vae", r"--vae gone\.safetensors: no such file$"),
    "x.ckpt": ("text_encoder", r"--text-encoder x\.ckpt: is a pickle, which can run code"),
    "x.dduf": ("text_encoder_2", r"--text-encoder-2 x\.dduf: is a DDUF file"),
    "folder.safetensors": ("vae", r"folder\.safetensors: is no regular file|cannot be read"),
    "x.txt": ("vae", r"x\.txt: is no file of weights that fluxcli reads, which end in \.safetensors, \.sft, \.gguf"),
    "lfs.safetensors": ("vae", r"lfs\.safetensors: is a git-lfs pointer"),
    "page.safetensors": ("vae", r"page\.safetensors: cannot be read: it is a web page"),
    "other.safetensors": ("vae", r"other\.safetensors: holds no vae: it is a denoiser$"),
}


def test_a_part_given_for_another_is_told(model: Path, tmp_path: Path) -> None:
    clip = {f"text_model.{name}": each for name, each in tensors(model, "text_encoder").items()}
    files = {
        "a denoiser": bfl(tensors(model, "transformer")),
        "a VAE": ae(tensors(model, "vae")),
        "a T5": tensors(model, "text_encoder_2"),
        "a CLIP": clip,
    }
    for number, (kind, given) in enumerate(files.items()):
        file = save(tmp_path / f"{number}.safetensors", given)
        part = ("vae", "text_encoder", "transformer", "text_encoder_2")[number]
        with pytest.raises(ModelError, match=rf"holds no {part}: it is {kind}$"):
            resolve(str(model), files={part: file})


@pytest.mark.parametrize("name", OPTIONS)
def test_what_an_option_cannot_name(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    Path("folder.safetensors").mkdir()
    Path("lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    Path("page.safetensors").write_text("<!doctype html><html></html>")
    shutil.copy("transformer/" + WEIGHTS["transformer"], "other.safetensors")
    for file in ("x.ckpt", "x.dduf", "x.txt"):
        Path(file).write_text("x")
    part, message = OPTIONS[name]
    with pytest.raises(ModelError, match=message):
        resolve(".", files={part: name})


def test_a_file_alone_needs_all_parts(model: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "flux1.safetensors", bfl(tensors(model, "transformer")))
    with pytest.raises(
        ModelError, match=r"holds the transformer alone; give --text-encoder, --text-encoder-2, --vae too"
    ):
        resolve(str(file))
    vae = save(tmp_path / "ae.safetensors", ae(tensors(model, "vae")))
    with pytest.raises(ModelError, match=r"holds no transformer but vae; give it as --vae"):
        resolve(str(vae))
    with pytest.raises(ModelError, match=r"only a model from the hub has revisions"):
        resolve(str(all_in_one(model, tmp_path / "all.safetensors")), "main")


@pytest.mark.parametrize("name", ["random:flux-dev", "random:flux-schnell"])
def test_weights_that_are_made_up_are_no_files(model: Path, tmp_path: Path, name: str) -> None:
    file = save(tmp_path / "ae.safetensors", ae(tensors(model, "vae")))
    with pytest.raises(ModelError, match=rf"--vae: the weights of {name} are made up"):
        resolve(name, files={"vae": file})


def test_of_a_part_with_a_file_the_folder_may_lack_its_weights(model: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "ae.safetensors", ae(tensors(model, "vae")))
    (model / "vae" / WEIGHTS["vae"]).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert resolve(str(model), files={"vae": file}).files == {"vae": file}


def test_a_built_in_model_keeps_its_schedule(tmp_path: Path) -> None:
    file = save(tmp_path / "ae.safetensors", ae(tensors(BUILT_IN / "tiny", "vae")))
    assert resolve("tiny", files={"vae": file}).scheduler == BUILT_IN / "tiny" / "scheduler"
    assert resolve("random:flux-schnell").scheduler == BUILT_IN / "flux-schnell" / "scheduler"


def test_the_fingerprint_is_the_files_and_not_their_names(model: Path, tmp_path: Path) -> None:
    given = bfl(tensors(model, "transformer"))
    one = save(tmp_path / "one.safetensors", given)
    two = save(tmp_path / "two.safetensors", given)
    other = save(tmp_path / "other.safetensors", given | {"img_in.bias": given["img_in.bias"] * 2})
    prints = [resolve(str(model), files={"transformer": file}).fingerprint() for file in (one, two, other)]
    assert prints[0] == prints[1] != prints[2]
    assert resolve(str(model)).fingerprint() not in prints


def test_a_whole_file_over_a_directory_is_read_for_the_parts_that_it_is_given_for(model: Path, tmp_path: Path) -> None:
    whole = all_in_one(model, tmp_path / "all.safetensors", scaled)
    prints = {part: resolve(str(model), files={part: whole}).fingerprint() for part in (*FILE_PARTS, *FILE_PARTS[:1])}
    assert len(set(prints.values())) == len(FILE_PARTS)


def test_flux1s_own_sizes_and_names() -> None:
    """The 780 tensors of flux1-dev.safetensors, of which a few are looked up here as the file has them."""
    config = FluxConfig.from_json(resolve("random:flux-dev").transformer)
    with torch.device("meta"):
        flux = Flux(config, Reference())
    shapes: dict[str, list[list[int]]] = {}
    for name, slot in flux.slots(table):
        shapes.setdefault(name, []).append(list(slot.shape))
    assert len(shapes) == 780
    assert shapes["double_blocks.18.txt_mod.lin.weight"] == [[18432, 3072]]
    assert shapes["double_blocks.0.img_attn.norm.query_norm.scale"] == [[128]]
    assert shapes["double_blocks.3.txt_mlp.0.bias"] == [[12288]]
    assert shapes["single_blocks.37.linear1.weight"] == [[21504, 3072]]
    assert shapes["single_blocks.0.linear2.weight"] == [[3072, 15360]]
    assert shapes["guidance_in.in_layer.weight"] == [[3072, 256]]
    assert shapes["final_layer.adaLN_modulation.1.weight"] == [[3072, 3072]] * 2
    assert sum(parameter.numel() for parameter in flux.parameters()) == 11_901_408_320


def test_flux1s_own_vocabularies_are_built_in() -> None:
    both = Tokenizers(BUILT_IN / "flux-dev")
    assert both.t5(["a photo of a cat"], 9) == [[3, 9, 1202, 13, 3, 9, 1712, 1, 0]]
    assert both.clip(["a photo of a cat"])[0][:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert len(both.clip(["x"])[0]) == 77


def test_random_models_keep_the_fingerprints_that_their_jobs_have() -> None:
    """They borrow another's tokenizers, and are known by their configs alone."""
    expected = {
        "random:flux-dev": "2:398fda0e7ca67ab1b1db249346053e3b",
        "random:flux-schnell": "2:a4d68bcdb5af31274e884ee9ff5f7a7a",
    }
    assert {name: resolve(name).fingerprint() for name in expected} == expected


def test_kontext_draws_from_text_alone(model: Path) -> None:
    edit(model / "model_index.json", _class_name="FluxKontextPipeline", image_encoder=[None, None])
    assert resolve(str(model)).row_defaults() == resolve("tiny").row_defaults()
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"
