"""Adapters come and go in a running engine: bit by bit what was there before, in place, in 8 bits too."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxcli.core.config import EngineConfig
from fluxcli.core.records import Adapter
from fluxcli.engine.engine import Engine
from fluxcli.engine.weights import merging
from fluxcli.models.checkpoints import resolve
from tests.adapters import FORMATS, PARTS, TEXT_FORMATS, Made, Maker, plain
from tests.engine.test_parity import worst
from tests.engine.weights.test_adapters import adapter, rows, run
from tests.pipelines import DEV


def engine(directory: Path, dtype: str = "bfloat16", quantization: str = "none") -> Engine:
    return Engine(resolve(str(directory)), EngineConfig("cpu", dtype, False, "auto", quantization))


def snapshot(engine: Engine) -> dict[str, torch.Tensor]:
    """Every tensor of the denoiser as bytes, scales too."""
    return {name: each.detach().clone().view(torch.uint8) for name, each in engine.flux.named_parameters()}


def addresses(engine: Engine) -> dict[str, int]:
    return {name: each.data_ptr() for name, each in engine.flux.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def files(pipeline, tmp_path: Path) -> list[Adapter]:
    names = ("diffusers, attention", "kohya", "xlabs", "onetrainer")
    return [
        adapter(FORMATS[name](Maker(pipeline(DEV), number)).write(tmp_path / f"{number}.safetensors"))
        for number, name in enumerate(names)
    ]


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_weights_after_many_swaps_are_those_of_one_bit_by_bit(pipeline, files, quantization: str) -> None:
    used = engine(pipeline(DEV), quantization=quantization)
    before, places = snapshot(used), addresses(used)
    sets = [(files[0],), (files[1], files[0]), (), (files[2],), (replace(files[3], scale=-0.5),)]
    for _ in range(4):
        for each in sets:
            used.merged.use(each)
    after = snapshot(used)
    assert addresses(used) == places, "captured graphs read these"
    assert not same(after, before)
    fresh = engine(pipeline(DEV), quantization=quantization)
    fresh.merged.use(sets[-1])
    assert same(after, snapshot(fresh))
    used.merged.use(())
    assert same(snapshot(used), before)
    assert used.merged.swaps == 21 and not used.merged.use(())


def merged_by_hand(directory: Path, to: Path, *added: tuple[Made, float]) -> Path:
    """A checkpoint with these differences in its weights."""
    shutil.copytree(directory, to)
    for part, file in PARTS.items():
        weights = load_file(to / file)
        for made, scale in added:
            for (where, name), difference in made.differences.items():
                if where == part:
                    key = next(
                        key for key in weights if key.removeprefix("text_model.") == name.removeprefix("text_model.")
                    )
                    weights[key] = weights[key] + scale * difference
        save_file(weights, to / file, metadata={"format": "pt"})
    return to


def test_in_8_bits_as_a_checkpoint_that_was_merged_before(pipeline, tmp_path: Path) -> None:
    """From what the files hold, not from what was rounded already: the same values and scales, but for sums that lie on
    the edge between two steps."""
    directory = pipeline(DEV)
    made = FORMATS["kohya"](Maker(directory))
    ours = engine(directory, "float32", "fp8")
    before = snapshot(ours)
    ours.merged.use((adapter(made.write(tmp_path / "a.safetensors"), 0.05),))
    theirs = snapshot(engine(merged_by_hand(directory, tmp_path / "merged", (made, 0.05)), "float32", "fp8"))
    moved = same_ = 0
    for name, each in snapshot(ours).items():
        if name.endswith("weight") and "blocks" in name and "norm" not in name:
            moved += int((each != before[name]).sum())
            same_ += int((each == theirs[name]).sum())
            assert (each == theirs[name]).float().mean() > 0.999, name
    assert moved > 0.2 * same_, "a difference smaller than a step moves many values all the same"


def test_images_in_8_bits_are_those_of_such_a_checkpoint(pipeline, tmp_path: Path) -> None:
    directory = pipeline(DEV)
    maker = Maker(directory)
    made = maker.made(maker.diffusers("attn"), plain("transformer."))
    file = adapter(made.write(tmp_path / "a.safetensors"))
    merged = merged_by_hand(directory, tmp_path / "merged", (made, 1.0))
    ours = run(engine(directory, "float32", "fp8"), rows(file)).astype(float)
    theirs = run(engine(merged, "float32", "fp8"), rows()).astype(float)
    without = run(engine(directory, "float32", "fp8"), rows()).astype(float)
    assert abs(ours - theirs).mean() < 0.1 * abs(without - theirs).mean()


def test_a_checkpoint_in_8_bits_gets_its_own_bits_back(pipeline, files, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(pipeline(DEV), tmp_path / "eight"))
    path = directory / PARTS["transformer"]
    weights = load_file(path)
    for name in [name for name in weights if name.endswith("attn.to_q.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[name.replace(".weight", ".weight_scale")] = scale
    save_file(weights, path, metadata={"format": "pt"})
    used = engine(directory, quantization="fp8")
    before = snapshot(used)
    used.merged.use((files[0],))
    assert not same(snapshot(used), before)
    used.merged.use(())
    assert same(snapshot(used), before)


def test_made_up_weights_are_made_up_again_for_8_bits(files) -> None:
    """What `random:` models are quantised from is drawn anew, the same."""
    from fluxcli.engine.weights.fill import read_wide

    name = "single_transformer_blocks.3.proj_mlp.weight"
    checkpoint = replace(resolve("tiny"), random=True)
    plain_ = Engine(checkpoint, EngineConfig("cpu", "bfloat16", False))
    wanted = dict(plain_.flux.slots())[name]
    make = lambda shape, dtype: torch.empty(shape, dtype=dtype)  # noqa: E731
    read = read_wide(checkpoint, {name}, make, "cpu", torch.bfloat16)
    assert torch.equal(read[name], wanted)
    block = name.removesuffix("proj_mlp.weight")
    assert read.keys() == {name, *(f"{block}attn.to_{each}.weight" for each in "qkv")}


def test_a_swap_that_breaks_off_is_made_good_by_the_next(pipeline, files, monkeypatch) -> None:
    used = engine(pipeline(DEV))
    before = snapshot(used)
    calls = 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return merging_store(*args, **kwargs)

    merging_store = merging.store
    monkeypatch.setattr(merging, "store", failing)
    with pytest.raises(torch.OutOfMemoryError):
        used.merged.use((files[1],))
    assert not same(snapshot(used), before)
    used.merged.use(())
    assert same(snapshot(used), before)


def test_prompts_are_encoded_again_only_where_their_meaning_changed(pipeline, files, tmp_path: Path) -> None:
    used = engine(pipeline(DEV), "float32")
    assert not used.merged.use((files[0],)), "attention of the denoiser"
    maker = Maker(pipeline(DEV))
    made = maker.made({"context_embedder": ["context_embedder"]}, plain("transformer."))
    assert used.merged.use((adapter(made.write(tmp_path / "txt_in.safetensors")),))
    assert used.merged.use((files[0],)), "and back"
    text = adapter(TEXT_FORMATS["kohya"](maker).write(tmp_path / "text.safetensors"))
    assert used.merged.use((text,)) and used.merged.use(())


@pytest.mark.slow
def test_a_compiled_engine_is_not_compiled_again(pipeline, files) -> None:
    from fluxcli.engine.runtime.compile_cache import compile_counts

    used = Engine(resolve(str(pipeline(DEV))), EngineConfig("cpu", "float32", True))
    plain_ = engine(pipeline(DEV), "float32")
    first = run(used, rows(files[0]))
    before = compile_counts()["graphs"]
    assert before > 0
    for file in (*files[1:], files[0]):
        assert worst(run(used, rows(file)), run(plain_, rows(file))) <= 1
    assert worst(run(used, rows()), run(plain_, rows())) <= 1
    assert (run(used, rows(files[0])) == first).all()
    assert compile_counts()["graphs"] == before


def test_copies_are_of_what_was_changed_and_made_once(pipeline, files) -> None:
    used = engine(pipeline(DEV))
    assert used.merged.copies == {"device": 0, "host": 0}
    used.merged.use((files[0],))
    names = {f"{layer}.weight" for layer in Maker(pipeline(DEV)).diffusers("attn")}
    size = sum(slot.nbytes for name, slot in used.flux.slots() if name in names)
    assert used.merged.copies == {"device": 0, "host": size}
    used.merged.use((replace(files[0], scale=0.5),))
    assert used.merged.copies == {"device": 0, "host": size}
