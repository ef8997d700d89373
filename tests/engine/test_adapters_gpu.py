"""Adapters on a GPU: swapped under captured graphs, with copies on the host and on the device, in 8 bits, and beside a
T5 that lives on the host."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcli.core.records import Adapter, Batch, ShapeKey
from fluxcli.engine import memory
from fluxcli.engine.engine import Engine
from fluxcli.engine.memory import MemoryPlan
from fluxcli.engine.runtime.compile_cache import compile_counts
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.runtime.graphs import Captured
from fluxcli.models.checkpoints import resolve
from tests.adapters import FORMATS, TEXT_FORMATS, Maker
from tests.engine.test_parity import records
from tests.engine.weights.test_adapters import adapter
from tests.engine.weights.test_adapters import run as run_on
from tests.pipelines import DEEP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]

KEY = ShapeKey(2, 128, 64, 64)


def engine(directory: Path, quantization: str = "none") -> Engine:
    config = resolve_device("cuda", "bfloat16", None, "auto", quantization)
    made = Engine(resolve(str(directory)), config, [KEY])
    made.warm_up([KEY])
    return made


def rows(*adapters: Adapter):
    return [replace(row, adapters=adapters) for row in records(DEEP, 2, KEY.width, KEY.height, 64, steps=3)]


@pytest.fixture
def files(pipeline, tmp_path: Path) -> list[Adapter]:
    made = [FORMATS["kohya"], FORMATS["diffusers, every layer"], FORMATS["xlabs"], TEXT_FORMATS["kohya"]]
    paths = [tmp_path / f"{number}.safetensors" for number in range(len(made))]
    for number, (make, path) in enumerate(zip(made, paths, strict=True)):
        make(Maker(pipeline(DEEP), number)).write(path)
    return [adapter(path) for path in paths]


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("copies", ["device", "host"])
def test_a_swap_recompiles_and_recaptures_nothing(
    pipeline, files, copies: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if copies == "host":
        monkeypatch.setattr(memory, "plan", lambda *_: MemoryPlan())
    made = engine(pipeline(DEEP), quantization)
    base = run_on(made, rows())
    first = run_on(made, rows(files[0]))
    counted, captures = compile_counts()["graphs"], []
    begin = Captured.__init__

    def counting(self, *args, **kwargs) -> None:
        captures.append(args)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(Captured, "__init__", counting)
    sets = [(files[1],), (files[2], files[0]), (files[3],), (replace(files[1], scale=0.5),), (files[0],), ()]
    pictures = [run_on(made, rows(*each)) for each in sets]
    assert compile_counts()["graphs"] == counted and not captures, "0 recompiles, 0 recaptures"
    assert made.replays == 3 * (2 + len(sets))
    assert (pictures[-2] == first).all() and (pictures[-1] == base).all()
    assert made.merged.swaps == 1 + len(sets)
    other = {"device": "host", "host": "device"}[copies]
    assert made.merged.copies[copies] > 0 == made.merged.copies[other]
    monkeypatch.undo()
    for each, picture in zip(sets[:-2], pictures, strict=False):
        fresh = run_on(engine(pipeline(DEEP), quantization), rows(*each))
        assert (fresh == picture).all(), "as an engine that never had another"
        assert (picture != base).any()


def test_it_draws_what_a_cpu_draws(pipeline, files) -> None:
    config = resolve_device("cuda", "float32", None, "auto")
    ours = Engine(resolve(str(pipeline(DEEP))), config, [KEY])
    theirs = Engine(resolve(str(pipeline(DEEP))), resolve_device("cpu", "float32", None, "auto"))
    for each in ((files[0],), (files[3], files[2])):
        pictures = [run_on(one, rows(*each)).astype(int) for one in (ours, theirs)]
        assert abs(pictures[0] - pictures[1]).max() <= 2


def test_a_text_encoder_that_visits_is_adapted_at_home(pipeline, files, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = run_on(engine(pipeline(DEEP)), rows(files[3]))
    monkeypatch.setattr(memory, "plan", lambda *_: MemoryPlan(visiting_text=True))
    made = engine(pipeline(DEEP))
    assert made.memory.visiting_text
    base = run_on(made, rows())
    assert (run_on(made, rows(files[3])) == resident).all()
    assert (run_on(made, rows()) == base).all()


def test_a_swap_between_batches_in_flight_keeps_each_ones_pixels(pipeline, files) -> None:
    made = engine(pipeline(DEEP))
    alone = [run_on(made, rows(each)) for each in files[:2]]
    flights = [made.submit(Batch(n, KEY, 3, rows(each), adapters=(each,))) for n, each in enumerate(files[:2] * 2)]
    for flight, expected in zip(flights, alone * 2, strict=True):
        assert (flight.result().pixels == expected).all()


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "most"), [("device", 0.5), ("host", 3.0)])
def test_a_swap_at_full_size_and_a_step_after_it(copies: str, most: float, tmp_path: Path) -> None:
    """Of an adapter of rank 16 in every matrix of FLUX.1-dev's blocks, its file read and hashed."""
    from jobs.bench.adapters import measured, written

    checkpoint, config = resolve("random:flux-dev"), resolve_device("cuda", "bfloat16", None, "auto")
    pair = [written(checkpoint, tmp_path / f"{seed}.safetensors", 16, seed) for seed in range(2)]
    told = measured(checkpoint, config, ShapeKey(1, 1024, 1024, 512), pair, 4, copies)
    print(told)
    assert told["swap_s"]["median"] < most
    assert told["compiled_since"] == 0
    assert told["step_ms"]["with"] < 1.01 * told["step_ms"]["without"]
