"""What is planned with a given amount of GPU memory, and that blocks which only visit compute the same. Budgets are
made up, and on a GPU real."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import OutOfMemory
from fluxcli.core.records import Batch, Group, ShapeKey
from fluxcli.engine import memory
from fluxcli.engine.engine import Engine
from fluxcli.engine.memory import LargestBatch, MemoryPlan, Needs, plan
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.weights import fill
from fluxcli.models.checkpoints import resolve
from tests.engine.test_parity import records, run
from tests.pipelines import DEV

GPU = EngineConfig("cuda:0", "bfloat16", True)
ONE, EIGHT = (ShapeKey(batch, 1024, 1024, 512) for batch in (1, 8))


def flux() -> Needs:
    return Needs(resolve("random:flux-dev"), torch.bfloat16)


def budget(gigabytes: float, *shapes: ShapeKey) -> MemoryPlan:
    return plan(resolve("random:flux-dev"), GPU, shapes, int(gigabytes * 1e9))


def test_weights_are_counted_exactly() -> None:
    # The sizes in FLUX.1-dev's own indexes.
    for part, total in (("transformer", 23_802_816_640), ("text_encoder_2", 9_524_621_312)):
        assert fill.size(resolve("random:flux-dev"), part, torch.bfloat16) == total


def test_everything_stays_where_there_is_room() -> None:
    assert not budget(140, EIGHT).visiting_text
    assert not budget(48, ONE).visiting_text


def test_the_text_encoder_stays_away_where_room_is_short() -> None:
    assert budget(40, EIGHT).visiting_text
    assert budget(34, ONE).visiting_text
    for made in (budget(40, EIGHT), budget(140, EIGHT)):
        assert made.needed <= made.available


def test_a_batch_too_large_is_left_to_the_runner_as_long_as_one_picture_fits() -> None:
    assert budget(34, EIGHT._replace(batch_size=256)).visiting_text


def test_what_cannot_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(
        OutOfMemory, match=r"random:flux-dev does not fit: one image of 1024x1024 with 512 text.*20\.0 GB"
    ):
        budget(20, EIGHT, ONE)
    with pytest.raises(OutOfMemory, match="4096x4096"):
        budget(40, ONE, ONE._replace(width=4096, height=4096))


def test_a_shape_needs_more_the_larger_it_is_and_smaller_ones_beside_it_hardly_more() -> None:
    needs = flux().shapes
    assert needs([ONE]) < needs([ShapeKey(1, 2048, 1024, 512)]) < needs([ShapeKey(8, 2048, 1024, 512)])
    assert needs([EIGHT]) <= needs([EIGHT, ONE]) < 1.1 * needs([EIGHT])


def test_a_step_cache_needs_two_streams_of_the_largest_images() -> None:
    with_cache = Needs(resolve("random:flux-dev"), torch.bfloat16, step_cache=True).shapes
    tokens, width, number_bytes = 8 * 64 * 64, 3072, 2
    assert with_cache([EIGHT, ONE]) - flux().shapes([EIGHT, ONE]) == 2 * tokens * width * number_bytes


def largest(gigabytes: float, monkeypatch: pytest.MonkeyPatch) -> LargestBatch:
    monkeypatch.setattr(memory, "free", lambda device: int(gigabytes * 1e9))
    return LargestBatch(resolve("random:flux-dev"), GPU)


def room(images: int, visiting: bool = False) -> float:
    """Gigabytes that so many images of 1024x1024 just fit."""
    return (flux().weights(visiting) + flux().shapes([ONE._replace(batch_size=images)])) / 1e9 + 0.01


def test_an_automatic_batch_is_the_largest_that_fits_up_to_16(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(1024, 1024, 512, 28)
    for size in (1, 2, 4, 8, 16):
        assert largest(room(size), monkeypatch)(group) == size
    assert largest(room(2) - 0.1, monkeypatch)(group) == 1
    assert largest(1000, monkeypatch)(group) == 16
    assert largest(room(4, visiting=True), monkeypatch)(group) == 4  # beside a T5 that visits
    assert largest(10, monkeypatch)(group) == 1  # the engine will refuse it and say why
    assert LargestBatch(resolve("tiny"), EngineConfig("cpu", "float32", False))(group) == 16


def test_nothing_is_planned_for_no_shapes() -> None:
    assert budget(1) == MemoryPlan()


@pytest.mark.parametrize("model", ["random", "files"])
def test_blocks_that_visit_compute_the_same_and_go_home(model: str, pipeline, monkeypatch) -> None:
    if model == "files":
        checkpoint = resolve(str(pipeline(DEV)))
    else:
        checkpoint = resolve("tiny")
        object.__setattr__(checkpoint, "random", True)
    resident, visiting = (
        fill.load_part(checkpoint, "text_encoder_2", "cpu", torch.float32, blocks) for blocks in (None, "encoder.block")
    )
    ids = torch.arange(12).view(2, 6)
    homes = {name: parameter.data_ptr() for name, parameter in visiting.named_parameters()}
    seen: dict[str, int] = {}
    for name, block in visiting.encoder.block.named_children():
        block.layer[0].register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: module.SelfAttention.q.weight.data_ptr()})
        )
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(visiting(ids).last_hidden_state, resident(ids).last_hidden_state)
        assert {name: parameter.data_ptr() for name, parameter in visiting.named_parameters()} == homes
    assert seen
    for name, address in seen.items():
        assert address != homes[f"encoder.block.{name}.layer.0.SelfAttention.q.weight"]


def test_a_visit_that_fails_leaves_every_block_at_home(pipeline, monkeypatch) -> None:
    model = fill.load_part(resolve(str(pipeline(DEV))), "text_encoder_2", "cpu", torch.float32, "encoder.block")
    homes = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    ids = torch.arange(6)[None]
    expected = model(ids).last_hidden_state
    with monkeypatch.context() as patch:
        patch.setattr(type(model.encoder.block[1].layer[1]), "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == homes
    assert torch.equal(model(ids).last_hidden_state, expected)


def test_free_memory_is_what_the_process_may_still_take(monkeypatch) -> None:
    figures = {"mem_get_info": (60, 100), "memory_reserved": 30, "memory_allocated": 10}
    for share, expected in ((1.0, 60 + 20), (0.5, 20 + 20)):
        for name, value in {**figures, "get_per_process_memory_fraction": share}.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        assert memory.free("cuda:0") == expected


# On a GPU, where what is planned is held to what happens.


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")(test))


@pytest.fixture
def gigabytes() -> Iterator[Callable[[float], None]]:
    """Leaves this process so much of the GPU and no more, beside what earlier tests still hold."""
    gc.collect()  # engines of earlier tests, whose graphs hold on to memory that counts as free
    torch.cuda.empty_cache()

    def leave(gigabytes: float) -> None:
        budget = gigabytes * 1e9 + torch.cuda.memory_reserved()
        torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.mem_get_info()[1])

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def on_the_gpu(shapes: list[ShapeKey], quantization: str = "none") -> Engine:
    config = replace(resolve_device("cuda", "bfloat16", None, "auto"), quantization=quantization)
    return Engine(resolve("random:flux-dev"), config, shapes)


def run_one(engine: Engine, key: ShapeKey) -> int:
    """A batch from warming up to its pictures; the most bytes that were allocated."""
    torch.cuda.reset_peak_memory_stats()
    engine.warm_up([key])
    rows = records(DEV, key.batch_size, key.width, key.height, key.text_length, steps=2)
    assert all(engine.submit(Batch(0, key, 2, rows)).result().finite)
    return torch.cuda.max_memory_allocated()


@on_gpu
@pytest.mark.parametrize("key", [ONE._replace(text_length=128), EIGHT], ids=str)
def test_flux_runs_within_40_gb(key: ShapeKey, gigabytes) -> None:
    gigabytes(40)
    engine = on_the_gpu([key])
    assert engine.memory.visiting_text == (key.batch_size > 1)
    peak = run_one(engine, key)
    print(f"{key}: planned {engine.memory.needed / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert 0.8 * engine.memory.needed < peak < engine.memory.needed


@on_gpu
def test_in_8_bits_flux_runs_on_a_card_of_24_gb(gigabytes) -> None:
    gigabytes(24)
    engine = on_the_gpu([ONE], "fp8")
    assert engine.memory.visiting_text
    peak = run_one(engine, ONE)
    print(f"planned {engine.memory.needed / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert 0.8 * engine.memory.needed < peak < engine.memory.needed


@on_gpu
@pytest.mark.parametrize("visiting", [False, True])
def test_what_is_planned_is_enough(visiting: bool, gigabytes) -> None:
    needs = flux()
    gigabytes((needs.weights(visiting) + needs.shapes([EIGHT])) / 1e9 + 0.1)
    engine = on_the_gpu([EIGHT])
    assert engine.memory.visiting_text == visiting
    run_one(engine, EIGHT)


@on_gpu
def test_flux_is_refused_20_gb_before_anything_is_loaded(gigabytes) -> None:
    gigabytes(20)
    before = torch.cuda.memory_allocated()
    with pytest.raises(OutOfMemory, match="does not fit: one image of 1024x1024"):
        on_the_gpu([EIGHT])
    assert torch.cuda.memory_allocated() == before


@on_gpu
def test_a_visiting_text_encoder_makes_the_same_pictures(pipeline, monkeypatch) -> None:
    rows = records(DEV, 2, 64, 64, 64, steps=2)
    config = resolve_device("cuda", "bfloat16", None, "auto")
    made = []
    for visiting in (False, True):
        monkeypatch.setattr(memory, "plan", lambda *args, visiting=visiting: MemoryPlan(visiting))
        made.append(run(Engine(resolve(str(pipeline(DEV))), config), rows))
    assert (made[0] == made[1]).all()


def test_on_a_cpu_the_weights_are_compared_with_the_memory_that_is_free() -> None:
    cpu, dev = EngineConfig("cpu", "float32", False), resolve("random:flux-dev")
    assert plan(dev, cpu, [ONE], int(70e9)).needed == pytest.approx(67.5e9, rel=0.01)
    with pytest.raises(
        OutOfMemory, match=r"its weights take 67\.5 GB in float32, and 40\.0 GB .* --dtype bfloat16, a GPU"
    ):
        plan(dev, cpu, [ONE], int(40e9))
    with pytest.raises(OutOfMemory, match=r"and 16\.0 GB of this machine's memory are free; use a GPU or a larger"):
        plan(dev, cpu, [], int(16e9))


@pytest.mark.parametrize(("limit", "free"), [(None, 9000 * 1024), ("max", 9000 * 1024), ("6000000", 4_500_000)])
def test_free_memory_is_what_linux_and_the_control_group_leave(limit: str | None, free: int, tmp_path: Path) -> None:
    assert memory.host_free(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal: 9999 kB\nMemAvailable:   8000 kB\nSwapFree: 1000 kB\nHugePages_Total:       0\n"
    )
    if limit is not None:
        group = tmp_path / "sys" / "fs" / "cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("2000000\n")
        (group / "memory.stat").write_text("anon 1500000\ninactive_file 500000\n")
    assert memory.host_free(tmp_path) == free
