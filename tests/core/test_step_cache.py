"""Masks: the published rule, what a preset saves, and what has no mask."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxcli.core.step_cache import FEWEST_STEPS, OFF, PRESETS, REUSED, StepCache, accumulated, interpolated

# FLUX.1-dev's as MagCache published them, over 28 steps; that diffusers has these tests/models/test_step_cache.py says.
DEV = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
    1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
    0.89062,
)  # fmt: skip
RATIOS = st.lists(st.floats(0.3, 3.0), min_size=1, max_size=60).map(lambda rest: (1.0, *rest))


@pytest.mark.parametrize(
    ("threshold", "most", "mask"),
    [
        (0.06, 2, "1111110101001001001001001011"),
        (0.06, 3, "1111110101000100010001001011"),
        (0.12, 4, "1111110010010000100001000101"),
        (0.24, 5, "1111110001000001000001000011"),  # MagCache's own rule would reuse the last step
    ],
)
def test_the_published_rule(threshold: float, most: int, mask: str) -> None:
    assert accumulated(DEV, threshold, most) == mask


@pytest.mark.parametrize(
    ("preset", "mask", "times"),
    [
        ("fine", "1111110101001001001001011111", 1.6),
        ("balanced", "1111110100100010001000100101", 2.1),
        ("fast", "1111110000100000100000100001", 2.8),
    ],
)
def test_what_the_presets_are_for_flux_dev(preset: str, mask: str, times: float) -> None:
    assert StepCache(preset, DEV).mask(28) == mask
    assert 28 / StepCache(preset, DEV).cost(28) == pytest.approx(times, rel=0.03)


@settings(max_examples=60, deadline=None)
@given(RATIOS, st.integers(FEWEST_STEPS, 80), st.sampled_from(sorted(PRESETS)))
def test_a_preset_gives_a_mask_for_any_model_and_number_of_steps(
    ratios: tuple[float, ...], steps: int, name: str
) -> None:
    mask, preset = StepCache(name, ratios).mask(steps), PRESETS[name]
    assert len(mask) == steps and mask[0] == mask[-1] == "1" and set(mask) <= {"0", "1"}
    assert "0" * (preset.most_reused + 1) not in mask
    kept = int(0.2 * steps + 0.5)
    assert "0" not in mask[:kept]
    fewest = kept + math.ceil((steps - kept) / (preset.most_reused + 1))
    assert mask.count("1") <= max(round(preset.evaluated * steps), fewest + 1)


@pytest.mark.parametrize("steps", [9, 10, 12, 20, 28, 30, 50, 100, 1000])
def test_at_every_number_of_steps_a_preset_saves_about_as_much(steps: int) -> None:
    for name, preset in PRESETS.items():
        evaluated = StepCache(name, DEV).mask(steps).count("1")
        assert abs(evaluated - preset.evaluated * steps) <= max(1, 0.02 * steps), (name, evaluated)


@settings(max_examples=40, deadline=None)
@given(RATIOS, st.integers(2, 80))
def test_ratios_of_another_number_of_steps_make_as_much_in_all(ratios: tuple[float, ...], steps: int) -> None:
    others = interpolated(ratios, steps)
    assert len(others) == steps and others[0] == 1
    assert math.prod(others) == pytest.approx(math.prod(ratios))
    assert interpolated(ratios, len(ratios)) == ratios


def test_what_a_row_and_a_plan_say() -> None:
    assert OFF.told(28) == {} and OFF.mask(28) == "" and OFF.cost(28) == 28
    cache = StepCache("1101")
    assert cache.told(4) == {"step_cache": "1101", "evaluated_steps": 3}
    assert cache.cost(4) == 3 + REUSED


def test_few_steps_have_none_to_spare_and_a_mask_fits_its_own_length() -> None:
    fast = StepCache("fast", DEV)
    assert fast.refusal(9) is None
    assert "needs 9 steps or more" in str(fast.refusal(8))
    assert StepCache("1010").refusal(4) is None
    assert "mask of 4 steps" in str(StepCache("1010").refusal(5))
    assert OFF.refusal(1) is None


def test_a_job_is_told_apart_by_what_fixes_its_masks() -> None:
    assert str(StepCache("1101")) == "1101"
    assert str(StepCache("fast", DEV)).startswith("fast (ratios ")
    assert str(StepCache("fast", DEV)) != str(StepCache("fast", DEV[:-1]))
