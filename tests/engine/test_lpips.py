"""LPIPS is asked of torchmetrics as it means it to be, and what fails there is one error of ours."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from fluxcli.engine.lpips import Lpips, Unavailable


class Metric(torch.nn.Module):
    """In the place of torchmetrics', whose weights no test can have: the mean difference."""

    def __init__(self, net_type: str, normalize: bool) -> None:
        super().__init__()
        assert (net_type, normalize) == ("alex", True), "AlexNet, of values from 0 to 1"

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[:2] == (1, 3) and a.dtype == torch.float32 and not torch.is_grad_enabled()
        assert float(min(a.min(), b.min())) >= 0 and float(max(a.max(), b.max())) <= 1
        return (a - b).abs().mean()


def install(monkeypatch: pytest.MonkeyPatch, metric: object) -> None:
    module = ModuleType("torchmetrics.image.lpip")
    module.LearnedPerceptualImagePatchSimilarity = metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchmetrics", ModuleType("torchmetrics"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image", ModuleType("torchmetrics.image"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)


def test_images_are_given_as_planes_from_0_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Metric)
    a, b = np.zeros((8, 24, 3), np.uint8), np.zeros((8, 24, 3), np.uint8)
    b[:, :, 1] = 255
    b.flags.writeable = False  # as a decoder hands them out
    assert Lpips("cpu")(a, b) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "error", [RuntimeError("operator is not there\nand more"), OSError("no network"), ImportError()]
)
def test_a_library_that_fails_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(**settings: object) -> None:
        raise error

    install(monkeypatch, fails)
    with pytest.raises(Unavailable) as told:
        Lpips("cpu")
    assert str(told.value) == (str(error).splitlines() or ["ImportError"])[0]
