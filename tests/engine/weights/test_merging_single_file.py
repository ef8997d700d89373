"""Adapters over a single file, whose names are Black Forest Labs': what they are over the same directory."""

from pathlib import Path

import pytest

from fluxcli.core.config import EngineConfig
from fluxcli.engine.engine import Engine
from fluxcli.models.checkpoints import resolve
from tests import single_files
from tests.adapters import FORMATS, Maker
from tests.engine.weights.test_adapters import adapter
from tests.engine.weights.test_merging import same, snapshot
from tests.pipelines import DEV


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("name", ["diffusers, attention", "kohya"])
def test_a_file_and_a_directory_merge_to_the_same_bits(name: str, quantization: str, pipeline, tmp_path: Path) -> None:
    directory = pipeline(DEV)
    file = single_files.save(
        tmp_path / "t.safetensors", single_files.bfl(single_files.tensors(directory, "transformer"))
    )
    used = adapter(FORMATS[name](Maker(directory)).write(tmp_path / "a.safetensors"))
    config = EngineConfig("cpu", "bfloat16", False, "auto", quantization)
    one, other = (
        Engine(resolve(str(directory)), config),
        Engine(resolve(str(directory), files={"transformer": file}), config),
    )
    plain = snapshot(other)
    assert same(snapshot(one), plain)
    for engine in (one, other):
        engine.merged.use((used,))
    assert same(snapshot(one), snapshot(other)) and not same(plain, snapshot(other))
    other.merged.use(())
    assert same(plain, snapshot(other))
