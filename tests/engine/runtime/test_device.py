"""Which torch fluxcli was tested with."""

import re
import tomllib
import warnings
from pathlib import Path

import pytest

from fluxcli.core.errors import Remark
from fluxcli.engine.runtime import device

PROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.mark.parametrize("release", ["2.10.1", "2.15.0+cpu", "3.0.0a0"])
def test_another_torch_is_told_in_a_line(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.torch, "__version__", release)
    with pytest.warns(Remark, match=rf"for torch 2\.11 to 2\.14, and {re.escape(release)} is"):
        assert device.resolve("cpu", "auto", None, "auto").device == "cpu"


@pytest.mark.parametrize("release", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130"])
def test_of_those_it_was_tested_with_nothing_is_told(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.torch, "__version__", release)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device.resolve("cpu", "auto", None, "auto")


def test_pip_installs_the_same() -> None:
    needed = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    (first, last) = device.TORCH
    bound = f"torch>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"
    assert bound in needed
