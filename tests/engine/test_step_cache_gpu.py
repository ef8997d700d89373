"""What only a GPU can show of the step cache: two captured graphs a shape, no wait for the host, a step's cost."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxcli.core.records import Batch, ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.models.checkpoints import resolve
from tests.engine.test_parity import records
from tests.engine.test_step_cache import masked_engine, run
from tests.pipelines import DEV

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
MASK = "110100101"


def rows(count: int, width: int = 64):
    return records(DEV, count, width, 64, 64, steps=len(MASK))


def captured(directory: Path) -> Engine:
    return masked_engine(directory, "cuda", "bfloat16")


def test_every_step_is_one_replay_of_one_of_the_shapes_graphs(pipeline) -> None:
    made = captured(pipeline(DEV))
    made.warm_up([ShapeKey(2, 64, 64, 64)])
    assert made.replays == 0
    for mask in (MASK, "", "1" + "0" * 8):
        run(made, rows(2), mask)
    assert made.replays == 3 * len(MASK)


def test_padding_neighbours_and_other_shapes_in_between_change_nothing(pipeline) -> None:
    made = captured(pipeline(DEV))
    some, wide = rows(4), rows(2, width=128)
    full, other = run(made, some, MASK), run(made, wide, MASK)
    assert (run(made, some[:3], MASK, size=4) == full[:3]).all()
    assert (run(made, some[::-1], MASK)[::-1] == full).all()
    assert (run(made, wide, MASK) == other).all()


def test_two_batches_in_flight_keep_their_own(pipeline) -> None:
    made, some = captured(pipeline(DEV)), rows(4)
    key = ShapeKey(2, 64, 64, 64)
    one, two = (Batch(i, key, len(MASK), some[2 * i : 2 * i + 2], MASK) for i in range(2))
    made.warm_up([key])
    first, second = made.submit(one), made.submit(two)
    assert (first.result().pixels == run(made, some[:2], MASK)).all()
    assert (second.result().pixels == run(made, some[2:], MASK)).all()


def test_a_mask_of_ones_is_off_to_the_last_bit(pipeline) -> None:
    off = Engine(resolve(str(pipeline(DEV))), resolve_device("cuda", "bfloat16", None, "auto"))
    plain = off.submit(Batch(0, ShapeKey(3, 64, 64, 64), len(MASK), rows(3))).result().pixels
    assert (run(captured(pipeline(DEV)), rows(3), "1" * len(MASK)) == plain).all()


def test_captured_and_uncaptured_agree_and_so_does_a_cpu(pipeline) -> None:
    directory = pipeline(DEV)
    graphs = run(masked_engine(directory, "cuda", "float32"), rows(3), MASK).astype(int)
    plain = run(masked_engine(directory, "cuda", "float32", compile=False), rows(3), MASK)
    assert np.abs(graphs - plain).max() <= 1
    assert np.abs(graphs - run(masked_engine(directory), rows(3), MASK)).max() <= 2


def test_a_mask_adds_no_wait_for_the_host(pipeline) -> None:
    made = captured(pipeline(DEV))
    key = ShapeKey(2, 64, 64, 64)
    waits = []
    for mask in ("", MASK):
        batch = Batch(0, key, len(MASK), rows(2), mask)
        made.submit(batch).result()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                flight = made.submit(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        flight.result()
        waits.append(len([each for each in told if "synchroniz" in str(each.message)]))
    assert waits[1] == waits[0]


@pytest.mark.slow
def test_a_reused_step_costs_a_fiftieth_at_most() -> None:
    """At FLUX.1-dev's size and 1024x1024; the bar of the step cache."""
    from dataclasses import replace

    from fluxcli.bench.inputs import Inputs
    from fluxcli.engine.runtime import stopwatch

    config = replace(resolve_device("cuda", "bfloat16", None, "auto"), step_cache=True)
    key = ShapeKey(1, 1024, 1024, 512)
    made = Engine(resolve("random:flux-dev"), config, [key])
    made.warm_up([key])
    inputs = Inputs(made.flux, key, config.device, config.dtype)
    with torch.inference_mode():
        txt, (moment,) = inputs.ours(made.flux, [0.9, 0.87])
        reused = moment._replace(ahead=torch.tensor(0.5, device=config.device))
        times = stopwatch.interleaved(
            {name: lambda each=each: made.denoise(key, inputs.img, txt, [each]) for name, each in
             (("evaluated", moment), ("reused", reused))},
            config.device, 1.0,
        )  # fmt: skip
    ms = {name: stopwatch.milliseconds(each) for name, each in times.items()}
    print(ms)
    assert ms["reused"] <= 0.02 * ms["evaluated"]
