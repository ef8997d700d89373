"""An image with adapters is the one that FluxPipeline makes of weights to which their matrices were added."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxcli.core.errors import ModelError
from fluxcli.core.records import Adapter, Batch, ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.models.checkpoints import resolve
from tests.adapters import FORMATS, TEXT_FORMATS, Made, Maker, plain, reference, underscored
from tests.engine.test_parity import cpu_engine, records, worst
from tests.pipelines import DEV, SCHNELL, Shape

pytestmark = pytest.mark.filterwarnings("error::fluxcli.core.errors.Remark")


def adapter(path: Path, scale: float = 1.0) -> Adapter:
    return Adapter(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), scale)


def rows(*adapters: Adapter, shape: Shape = DEV):
    return [replace(row, adapters=adapters) for row in records(shape, 2, 64, 64, 16, steps=2)]


def run(engine: Engine, rows) -> np.ndarray:
    first = rows[0]
    key = ShapeKey(len(rows), first.height, first.width, first.text_length)
    result = engine.submit(Batch(0, key, first.num_inference_steps, rows, adapters=first.adapters)).result()
    assert all(result.finite)
    return result.pixels


@pytest.fixture(scope="module")
def engine(pipeline) -> Engine:
    """One for all: each test begins with what the last one left in the weights."""
    return cpu_engine(pipeline(DEV))


@pytest.fixture(scope="module")
def base(pipeline) -> np.ndarray:
    return reference(pipeline(DEV), rows())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_equals_weights_merged_by_hand(name: str, pipeline, engine, base, tmp_path: Path) -> None:
    directory = pipeline(DEV)
    made = FORMATS[name](Maker(directory))
    path = made.write(tmp_path / "adapter.safetensors")
    theirs = reference(directory, rows(), (made.differences, 1.0))
    assert worst(theirs, base) > 20, "an adapter that changes nothing would prove nothing"
    assert worst(run(engine, rows(adapter(path))), theirs) <= 1
    assert worst(run(engine, rows()), base) <= 1


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_text_encoders_are_adapted_too(name: str, pipeline, engine, base, tmp_path: Path) -> None:
    directory = pipeline(DEV)
    made = TEXT_FORMATS[name](Maker(directory))
    assert {part for part, _ in made.differences} == {"text_encoder", "text_encoder_2"}
    theirs = reference(directory, rows(), (made.differences, 1.0))
    assert worst(theirs, base) > 10
    run(engine, rows())  # whose prompts' embeddings are remembered
    assert worst(run(engine, rows(adapter(made.write(tmp_path / "a.safetensors")))), theirs) <= 1
    assert worst(run(engine, rows()), base) <= 1


def test_a_model_without_guidance(pipeline, tmp_path: Path) -> None:
    directory = pipeline(SCHNELL)
    maker = Maker(directory)
    made = maker.made(maker.diffusers(), plain("transformer."))
    theirs = reference(directory, rows(shape=SCHNELL), (made.differences, 1.0))
    ours = run(cpu_engine(directory), rows(adapter(made.write(tmp_path / "a.safetensors")), shape=SCHNELL))
    assert worst(ours, theirs) <= 1


def test_several_with_scales_over_each_other(pipeline, engine, tmp_path: Path) -> None:
    """One by diffusers' names and one by Black Forest Labs': to_q is a third of qkv."""
    directory = pipeline(DEV)
    one, two = FORMATS["diffusers, attention"](Maker(directory, 1)), FORMATS["kohya"](Maker(directory, 2))
    three = FORMATS["xlabs"](Maker(directory, 3))
    files = [made.write(tmp_path / f"{number}.safetensors") for number, made in enumerate((one, two, three))]
    scales = (0.6, -0.3, 0.5)
    added = [(made.differences, scale) for made, scale in zip((one, two, three), scales, strict=True)]
    theirs = reference(directory, rows(), *added)
    assert worst(theirs, reference(directory, rows(), *added[:2])) > 5
    assert worst(run(engine, rows(*map(adapter, files, scales))), theirs) <= 1


def test_differences_of_biases_and_norms(pipeline, engine, base, tmp_path: Path) -> None:
    directory = pipeline(DEV)
    maker = Maker(directory)
    weights = maker.weights["transformer"]
    made, attn = Made(), "transformer_blocks.0.attn"
    for theirs, ours, ending in (
        ("double_blocks.0.img_attn.norm.key_norm.scale", f"{attn}.norm_k.weight", "diff"),
        ("double_blocks.1.txt_attn.norm.query_norm.scale", "transformer_blocks.1.attn.norm_added_q.weight", "diff"),
        ("double_blocks.0.img_attn.proj", f"{attn}.to_out.0.bias", "diff_b"),
        ("double_blocks.0.img_mlp.2", "transformer_blocks.0.ff.net.2.weight", "diff"),
    ):
        difference = maker.drawn(*weights[ours].shape) * 0.2
        made.tensors[f"diffusion_model.{theirs}.{ending}"] = difference
        made.differences["transformer", ours] = difference
    qkv = maker.drawn(3 * 96)
    made.tensors["diffusion_model.double_blocks.1.img_attn.qkv.diff_b"] = qkv
    for layer, part in zip("qkv", qkv.chunk(3), strict=True):
        made.differences["transformer", f"transformer_blocks.1.attn.to_{layer}.bias"] = part
    theirs = reference(directory, rows(), (made.differences, 1.0))
    assert worst(theirs, base) > 5
    assert worst(run(engine, rows(adapter(made.write(tmp_path / "a.safetensors")))), theirs) <= 1


@pytest.mark.parametrize("by", ["peft", "kohya", "kohya, columns"])
def test_dora(by: str, pipeline, engine, base, tmp_path: Path) -> None:
    """W + BA brought to other norms, at half its difference."""
    directory = pipeline(DEV)
    maker = Maker(directory)
    if by == "peft":
        made = maker.made(maker.diffusers("attn"), plain("transformer."))
        layers = {f"transformer.{name}.lora_magnitude_vector": each for name, each in maker.diffusers("attn").items()}
    else:
        names = maker.bfl()
        made = maker.made(names, underscored("lora_unet_"), "lora_down.weight", "lora_up.weight", alpha=2.0)
        layers = {f"lora_unet_{name.replace('.', '_')}.dora_scale": each for name, each in names.items()}
    for key, ours in layers.items():
        weight = torch.cat([maker.weights["transformer"][f"{layer}.weight"] for layer in ours])
        moved = weight + torch.cat([made.differences["transformer", f"{layer}.weight"] for layer in ours])
        dim = 0 if by == "kohya, columns" else 1
        norms = moved.norm(dim=dim, keepdim=True)
        wanted = norms * (0.6 + 0.8 * torch.rand(norms.shape, generator=maker.generator))
        made.differences |= maker.split(ours, moved * wanted / norms - weight)
        if "adaLN" in key and dim == 1:
            wanted = torch.cat(wanted.chunk(2)[::-1])
        made.tensors[key] = wanted.flatten() if by == "peft" else wanted
    theirs = reference(directory, rows(), (made.differences, 0.5))
    assert worst(theirs, base) > 20
    assert worst(run(engine, rows(adapter(made.write(tmp_path / "a.safetensors"), 0.5))), theirs) <= 1


@pytest.mark.parametrize("by", ["ai-toolkit", "lycoris"])
def test_lokr(by: str, pipeline, engine, base, tmp_path: Path) -> None:
    directory = pipeline(DEV)
    maker, made = Maker(directory), Made()
    layers = maker.diffusers("attn") if by == "ai-toolkit" else maker.bfl()
    key = plain("transformer.") if by == "ai-toolkit" else underscored("lycoris_")
    for number, (name, ours) in enumerate(layers.items()):
        rows_, columns = maker.shape(ours)
        w1 = maker.drawn(4, 4) * 0.3
        if by == "ai-toolkit":
            w2 = maker.drawn(rows_ // 4, columns // 4) * columns**-0.5
            made.tensors |= {f"{key(name)}.lokr_w1": w1, f"{key(name)}.lokr_w2": w2}
            made.tensors[f"{key(name)}.alpha"] = torch.tensor(1e10)  # counts only where a factor is a product
            difference = torch.kron(w1, w2)
        else:
            a, b = maker.drawn(rows_ // 4, 2) * 0.4, maker.drawn(2, columns // 4) * columns**-0.5
            made.tensors |= {f"{key(name)}.lokr_w2_a": a, f"{key(name)}.lokr_w2_b": b}
            if number % 2:
                c, d = maker.drawn(4, 2) * 0.5, maker.drawn(2, 4) * 0.5
                made.tensors |= {f"{key(name)}.lokr_w1_a": c, f"{key(name)}.lokr_w1_b": d}
                w1 = c @ d
            else:
                made.tensors[f"{key(name)}.lokr_w1"] = w1
            made.tensors[f"{key(name)}.alpha"] = torch.tensor(3.0)
            difference = torch.kron(w1, a @ b) * 1.5
        if name.endswith("adaLN_modulation.1"):
            difference = torch.cat(difference.chunk(2)[::-1])
        made.differences |= maker.split(ours, difference)
    theirs = reference(directory, rows(), (made.differences, 1.0))
    assert worst(theirs, base) > 20
    assert worst(run(engine, rows(adapter(made.write(tmp_path / "a.safetensors")))), theirs) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_files_of_other_dtypes(dtype: torch.dtype, pipeline, engine, tmp_path: Path) -> None:
    directory = pipeline(DEV)
    maker = Maker(directory)
    made = maker.made(maker.diffusers("attn"), plain("transformer."))
    made.tensors = {name: each.to(dtype) for name, each in made.tensors.items()}
    rounded = {name: each.float() for name, each in made.tensors.items()}
    made.differences = {
        ("transformer", f"{name}.weight"): rounded[f"transformer.{name}.lora_B.weight"]
        @ rounded[f"transformer.{name}.lora_A.weight"]
        for name in maker.diffusers("attn")
    }
    theirs = reference(directory, rows(), (made.differences, 1.0))
    assert worst(run(engine, rows(adapter(made.write(tmp_path / "a.safetensors")))), theirs) <= 1


def test_a_file_that_changed_since_it_was_looked_at_ends_the_job(pipeline, engine, tmp_path: Path) -> None:
    maker = Maker(pipeline(DEV))
    path = FORMATS["diffusers, attention"](maker).write(tmp_path / "a.safetensors")
    seen = adapter(path)
    before = run(engine, rows())
    FORMATS["diffusers, attention"](maker).write(path)
    with pytest.raises(ModelError, match="has changed since the job looked at it"):
        run(engine, rows(seen))
    path.unlink()
    with pytest.raises(ModelError, match=r"a\.safetensors: "):
        run(engine, rows(seen))
    assert (run(engine, rows()) == before).all()


def test_the_library_hashes_what_the_engine_reads(pipeline, tmp_path: Path) -> None:
    directory = pipeline(DEV)
    path = FORMATS["kohya"](Maker(directory)).write(tmp_path / "a.safetensors")
    assert resolve(str(directory)).adapters.adapter(str(path), 0.5) == adapter(path, 0.5)
