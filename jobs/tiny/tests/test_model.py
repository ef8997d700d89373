"""The built-in model draws what unseen prompts say, through diffusers, from the weights that ship.

How the settings of fluxcli bear on adherence is the matter of tests/models/tiny/test_adherence.py.
"""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from jobs.tiny.evaluate import cases, draw, score
from jobs.tiny.pipeline import DIRECTORY, suggestions
from jobs.tiny.scenes import place, render
from jobs.tiny.train import reconstruction


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    return FluxPipeline.from_pretrained(DIRECTORY, torch_dtype=torch.float32)


def test_the_vae_keeps_what_the_judge_reads(pipeline: FluxPipeline) -> None:
    for kind in ("single", "pair"):
        result = reconstruction(pipeline.vae, cases(kind, 16, seed=5), None)
        assert result["read"]["right"] == 1 and result["grey_levels"] < 1.5, (kind, result)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "aim"), [("single", 0.97), ("pair", 0.9), ("mixed", 0.9)])
def test_the_aims_are_reached(pipeline: FluxPipeline, kind: str, aim: float) -> None:
    wanted = cases(kind, 120)
    result = score(draw(pipeline, wanted), wanted)
    assert result["right"] >= aim, result
    assert result["wrong"].get("background", 0) == 0, result


def test_batch_size_changes_nothing_to_be_seen(pipeline: FluxPipeline) -> None:
    wanted = cases("single", 4, seed=2)
    together, alone = draw(pipeline, wanted, batch=4), draw(pipeline, wanted, batch=1)
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_the_noise_decides_only_what_the_prompt_leaves_open(pipeline: FluxPipeline) -> None:
    case = cases("single", 1)[0]
    first, second = draw(pipeline, [case, replace(case, seed=case.seed + 1)])
    assert first.tobytes() != second.tobytes()


def test_cases_are_reproducible_and_judged_right_when_rendered() -> None:
    wanted = cases("mixed", 20)
    assert wanted == cases("mixed", 20)
    rows = torch.tensor([place(case.spec, random.Random(case.seed)) for case in wanted])
    images = (render(rows) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert score(list(images), wanted)["right"] == 1


def test_what_it_says_of_itself_is_what_its_captions_are_made_of() -> None:
    assert json.loads((DIRECTORY / "fluxcli.json").read_text(encoding="utf-8")) == suggestions()
