"""--step-cache as text, and the ratios behind a preset: published, the model's own, or from anybody's file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluxcli.core.errors import FluxcliError, ModelError, UsageError
from fluxcli.core.step_cache import OFF, StepCache
from fluxcli.models.checkpoints import resolve
from fluxcli.models.step_cache import parse, published, read, settled, write
from tests.core.test_step_cache import DEV


def test_the_published_ratios_have_not_moved() -> None:
    """Where they do, masks of FLUX.1-dev change, and jobs that were begun are refused: tell it in the CHANGELOG."""
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    assert published() == DEV
    assert published() == pytest.approx(FLUX_MAG_RATIOS.tolist())


def test_reading_them_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys\nfrom fluxcli.models.step_cache import published\nassert len(published()) == 28\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'transformers'} & sys.modules.keys()\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_what_may_be_given(tmp_path: Path) -> None:
    assert parse("off") == parse(" OFF ") == OFF
    assert parse("Balanced") == StepCache("balanced")
    assert parse("1101") == StepCache("1101")
    write(tmp_path / "a:b.json", "any", 8, DEV)
    assert parse(f"{tmp_path}/a:b.json:fast") == StepCache("fast", DEV)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0110", "must begin with 1"),
        ("1" * 1001, "at most 1000 steps"),
        ("", "give off, fine, balanced, fast, FILE:PRESET"),
        ("quick", "--step-cache quick: give off"),
        (":fast", "give off"),
        ("nowhere.json:fast", "there is no file nowhere.json"),
        ("own.json:quick", "give off"),
        ("1012", "give off"),
    ],
)
def test_what_may_not(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "nonsense", '{"ratios": 1}', '{"ratios": {}}', '{"ratios": []}', '{"ratios": [1.0]}',
        '{"ratios": [1.0, "1"]}', '{"ratios": [1.0, null]}', '{"ratios": [1.0, true]}', '{"ratios": [1.0, 0]}',
        '{"ratios": [1.0, -1]}', '{"ratios": [1.0, NaN]}', '{"ratios": [1.0, Infinity]}', '{"ratios": [1.0, 1e400]}',
        '{"ratios": [1.0, [1.0]]}', '{"ratios": [1.0, 1' + "0" * 400 + "]}", '{"ratios": ' + "[" * 5000,
        json.dumps({"ratios": [1.0] * 1001}), " " * 2**18,
    ],
)  # fmt: skip
def test_a_file_from_anybody_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"own\.json: ") as caught:
        parse(f"{path}:balanced")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "own.json")
    with pytest.raises(FluxcliError, match="no regular file"):
        parse(f"{tmp_path}/own.json:balanced")


def test_a_preset_takes_the_models_own_ratios_where_it_has_some(tmp_path: Path) -> None:
    tiny = resolve("tiny")
    own = settled(parse("balanced"), tiny)
    assert own.ratios == read(tiny.directory / "step_cache.json") != published()
    assert settled(parse("balanced"), resolve("random:flux-dev")).ratios == published()
    write(tmp_path / "own.json", "any", 8, DEV)
    assert settled(parse(f"{tmp_path}/own.json:balanced"), tiny).ratios == DEV


def test_what_is_distilled_for_few_steps_has_no_preset_but_any_mask() -> None:
    schnell = resolve("random:flux-schnell")
    with pytest.raises(UsageError, match=r"distilled for few steps.*a mask"):
        settled(parse("fine"), schnell)
    assert settled(parse("1101"), schnell) == StepCache("1101")
    assert settled(OFF, schnell) == OFF


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a ratio must be a number"):
        write(tmp_path / "own.json", "any", 8, [1.0, float("nan")])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="cannot be written"):
        write(tmp_path / "nowhere" / "own.json", "any", 8, DEV)
