"""What `--batch-size auto` chooses: up to the knee, within memory, and the same again from the cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxcli.core.config import EngineConfig
from fluxcli.core.records import Group, ShapeKey
from fluxcli.engine import batching, memory
from fluxcli.engine.batching import BatchSizes, knee
from fluxcli.models.checkpoints import resolve

CPU = EngineConfig("cpu", "float32", False)
SMALL, LARGE = Group(256, 256, 128, 28), Group(1024, 1024, 512, 28)


@pytest.fixture
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """BatchSizes with a knee as if measured, and on a GPU if free gigabytes are given."""
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # restored afterwards

    def make(tokens: int, free: float | None = None, attention: str = "auto") -> BatchSizes:
        checkpoint = resolve("random:flux-dev")
        monkeypatch.setattr(batching, "measure", lambda *args: {tokens // 2: 2.0, tokens: 1.0, 2 * tokens: 0.99})
        made = BatchSizes(checkpoint, replace(CPU, attention=attention))
        if free is not None:
            made._needs, made._free = memory.Needs(checkpoint, torch.bfloat16), int(free * 1e9)
        return made

    return make


def room(size: int, visiting: bool = False) -> float:
    """Gigabytes that `size` pictures of LARGE just fit."""
    needs = memory.Needs(resolve("random:flux-dev"), torch.bfloat16)
    return (needs.weights(visiting) + needs.shapes([ShapeKey(size, 1024, 1024, 512)])) / 1e9 + 0.01


def test_the_knee_is_where_more_tokens_make_none_cheaper() -> None:
    assert knee({512: 1.0}) == 512
    assert knee({512: 4.0, 1024: 2.0, 2048: 1.04, 4096: 1.0, 8192: 1.01}) == 2048
    assert knee({512: 1.0, 1024: 1.2}) == 512
    assert knee({512: 1.02, 1024: 1.2, 2048: 1.0}) == 512


def test_small_pictures_get_large_batches_and_large_ones_small(sizes) -> None:
    chosen = sizes(4096)
    assert chosen.knee == 4096
    assert (chosen(SMALL), chosen(LARGE)) == (16, 1)
    assert sizes(4096)(Group(64, 64, 64, 4)) == 64


def test_memory_bounds_a_batch(sizes) -> None:
    chosen = sizes(32_768, free=140)
    assert (chosen(SMALL), chosen(LARGE)) == (64, 8)
    for size in (1, 2, 4, 8):
        assert sizes(32_768, free=room(size))(LARGE) == size
        assert sizes(32_768, free=room(size) - 0.1)(LARGE) == (size // 2 or 8)  # 8 while T5 visits


def test_where_t5_must_visit_the_rest_of_the_memory_is_used(sizes) -> None:
    for size in (1, 2, 4):
        assert sizes(32_768, free=room(size, visiting=True))(LARGE) == size
    assert sizes(32_768, free=10)(LARGE) == 1  # the engine will refuse it and say why


def test_it_is_measured_once(sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(4096).knee == 4096
    assert sizes(1024).knee == 4096
    BatchSizes(resolve("tiny"), EngineConfig("cpu", "float32", False))  # another architecture, measured by itself


def test_each_attention_has_a_knee_of_its_own(sizes) -> None:
    assert sizes(4096, attention="sdpa").knee == 4096
    assert sizes(1024, attention="sdpa").knee == 4096
    assert sizes(1024).knee == 1024


def test_a_measurement_is_of_rising_tokens_and_positive_times() -> None:
    measured = batching.measure(resolve("tiny"), CPU)
    assert list(measured) == [512 * 2**power for power in range(len(measured))]
    assert all(seconds > 0 for seconds in measured.values())
    assert knee(measured) in measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_batching_buys_little_at_1024_and_much_at_256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path))
    config = EngineConfig("cuda:0", "bfloat16", True)
    measured = batching.measure(resolve("random:flux-dev"), config)
    print({tokens: f"{1e9 * seconds:.0f} ns" for tokens, seconds in measured.items()}, "knee", knee(measured))
    # What stays are the workspaces of two streams; a block alone is larger.
    assert torch.cuda.memory_allocated() < 150e6
    chosen = BatchSizes(resolve("random:flux-dev"), config)
    assert chosen(SMALL) > chosen(LARGE)
