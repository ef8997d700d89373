"""What a run tells at its end, and of keys that are no settings."""

from typing import Any

import pytest

from fluxcli.core.config import RowDefaults
from fluxcli.job.input.intake import OneRow, take_in
from fluxcli.job.input.keys import meant
from fluxcli.job.report import text
from fluxcli.job.run.totals import Totals


def told(**given: Any) -> list[str]:
    return text.totals_lines(text.totals_data(Totals(rows=9, **given))).splitlines()


def test_a_summary_counts_as_people_do() -> None:
    first, stages = told(images=1, seconds=2.0, truncated=1, done_before=1)
    assert first == "1 image in 2.0 s (0.50 images/s), 0 failed, 1 with a truncated prompt, 1 image was done before"
    assert stages.startswith("time by stage: ")
    (first, _) = told(images=2, seconds=2.0, truncated=2, done_before=3, failures=1, skipped=2)
    assert first == (
        "2 images in 2.0 s (1.00 images/s), 1 failed, 2 with a truncated prompt, 3 images were done before, "
        "2 rows skipped that failed before"
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"failures": 1}, "1 row failed, and no image was made"),
        ({"failures": 3, "done_before": 2}, "3 rows failed, and no image was made, 2 images were done before"),
        ({"done_before": 1}, "nothing to do: 1 image was done before"),
        (
            {"done_before": 4, "skipped": 2},
            "nothing to do: 4 images were done before, 2 rows skipped that failed before",
        ),
    ],
)
def test_of_no_image_there_is_no_rate(given: dict[str, int], line: str) -> None:
    assert told(**given) == [line]


@pytest.mark.parametrize(
    ("key", "setting"),
    [
        *(("sed", "seed"), ("heigth", "height"), ("widht", "width"), ("num_step", "num_inference_steps")),
        *(("promt", "prompt"), ("guidence_scale", "guidance_scale"), ("Num Images", "num_images"), ("w", "width")),
        *(("numInferenceSteps", "num_inference_steps"), ("body.heigth", "height"), ("random_seed", "seed")),
    ],
)
def test_a_near_miss_is_told_what_it_may_mean(key: str, setting: str) -> None:
    assert meant(key) == setting


@pytest.mark.parametrize("key", ["tag", "category", "side", "ids", "weight", "style", "notes", "url", "x", "Note", ""])
def test_other_keys_are_anybodys(key: str) -> None:
    assert meant(key) is None


def test_near_misses_are_told_once_with_their_rows_and_what_is_kept_is_not() -> None:
    row = {"prompt": "a", "sed": 1, "heigth": 64, "num_steps": 4, "tag": "x", "category": 1}
    intake = take_in(OneRow(row), RowDefaults(64, 64, 4, None), (64,), lambda prompts: [1] * len(prompts))
    assert text.remarks(intake) == [
        "rows ask for what fluxcli does not do: num_steps (1 row; did you mean num_inference_steps?)",
        "keys that are no settings, kept under meta: sed (1 row; did you mean seed?), "
        "heigth (1 row; did you mean height?)",
    ]
