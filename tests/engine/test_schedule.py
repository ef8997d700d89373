"""The sigmas are those of diffusers' own scheduler, for every kind of schedule that a config may ask for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluxcli.core.errors import ModelError
from fluxcli.engine.denoise import Schedule

DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
CONFIGS: dict[str, dict[str, Any]] = {
    "dev": DYNAMIC,
    "schnell": {"shift": 1.0},
    "static": {"shift": 1.15, "use_dynamic_shifting": False},
    "karras": {**DYNAMIC, "use_karras_sigmas": True},
    "exponential": {**DYNAMIC, "use_exponential_sigmas": True},
    "linear": {**DYNAMIC, "time_shift_type": "linear"},
    "terminal": {**DYNAMIC, "shift_terminal": 0.1},
    "inverted": {**DYNAMIC, "invert_sigmas": True},
    "500": {**DYNAMIC, "num_train_timesteps": 500},
    "dynamic, its ends left out": {"use_dynamic_shifting": True},
}


def schedule(directory: Path, config: dict[str, Any]) -> Schedule:
    (directory / "scheduler_config.json").write_text(json.dumps(config))
    return Schedule(directory)


@pytest.mark.parametrize("config", CONFIGS)
def test_sigmas_and_timesteps_are_diffusers(config: str, tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    made = schedule(tmp_path, CONFIGS[config])
    reference = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    ends = (reference.config[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
    mu = calculate_shift(1024, *ends)
    for steps in (1, 4, 28):
        timesteps, sigmas = made(steps, 1024)
        reference.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        assert torch.allclose(sigmas, reference.sigmas, rtol=1e-6, atol=0, equal_nan=True)
        assert torch.allclose(timesteps, reference.timesteps, rtol=1e-6, atol=0, equal_nan=True)


def test_ends_that_are_not_used_may_be_null(tmp_path: Path) -> None:
    ends = dict.fromkeys(("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"))
    made = schedule(tmp_path, {"shift": 2.0, **ends})(4, 1024)
    assert torch.equal(made[1], schedule(tmp_path, {"shift": 2.0})(4, 1024)[1])


def test_a_schedule_that_cannot_be_made_is_a_models_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"scheduler_config\.json: makes no schedule: math range error"):
        schedule(tmp_path, {**DYNAMIC, "max_shift": 1e300})(4, 5000)
