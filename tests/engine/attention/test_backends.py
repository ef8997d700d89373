"""Which attention runs, and what is said where one cannot."""

import pytest
import torch

from fluxcli.core.errors import DeviceError
from fluxcli.engine.attention import backends

SHAPE = (1, 8, 2, 16)


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(backends, "attention", fail)


def test_a_backend_that_cannot_run_a_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RuntimeError("head dim 16 is not supported\nat some place"))
    with pytest.raises(DeviceError, match=r"^--attention fa2: .*: head dim 16 is not supported; use --attention auto$"):
        backends.require("fa2", *SHAPE, "cpu", torch.float32)


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_memory_that_ran_out_is_not_held_against_a_backend(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, fault("out of memory"))
    with pytest.raises(fault):
        backends.require("sdpa", *SHAPE, "cpu", torch.float32)
    with pytest.raises(fault):
        backends.milliseconds(*SHAPE, "cpu", torch.float32)


def test_backends_are_compared_again_when_another_release_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, str] = {}
    monkeypatch.setattr(backends, "version", installed.get)
    names = [backends.comparison(*SHAPE)]
    for release in ("4.0", "4.1"):
        installed["flash-attn-4"] = release
        names.append(backends.comparison(*SHAPE))
    assert len({*names, backends.comparison(2, *SHAPE[1:])}) == 4
