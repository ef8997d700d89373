"""A job over real prompts, where they are at hand, against diffusers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxcli.core.records import PromptRecord
from tests import pipelines
from tests.conftest import read_rows
from tests.engine.test_parity import reference, worst
from tests.pipelines import DEV, PARTI

pytestmark = pytest.mark.skipif(not pipelines.SHARED.is_dir(), reason="FLUX.1's files are not beside the project")


@pytest.fixture(scope="module")
def parti() -> list[dict[str, str]]:
    return pipelines.partiprompts()


@pytest.mark.slow
def test_a_job_over_200_partiprompts_joins_back_to_its_input_and_equals_diffusers(
    fluxcli, pipeline, parti: list[dict[str, str]], tmp_path: Path
) -> None:
    model = pipeline(DEV, real=True)
    options = ("--width", 64, "--height", 64, "--steps", 2, "--batch-size", 16, "--limit", 200)
    result = fluxcli("batch", PARTI, "-o", "out", "-m", model, *options)
    assert result.returncode == 0, result.stderr
    rows = {row["id"]: row for row in read_rows(tmp_path / "out" / "manifest.jsonl")}
    assert rows.keys() == {f"{index:06d}" for index in range(200)}
    made = []
    for row, given in ((rows[f"{index:06d}"], given) for index, given in enumerate(parti[:200])):
        assert {"Prompt": row["prompt"], **row["meta"]} == given
        made.append(np.asarray(Image.open(tmp_path / "out" / row["file_name"])))
    records = [
        PromptRecord(
            row["id"], row["prompt"], row["seed"], row["width"], row["height"], row["num_inference_steps"],
            row["guidance_scale"], 1, text_tokens=row["text_tokens"], text_length=row["text_length"],
        )
        for row in (rows[f"{index:06d}"] for index in range(200))
    ]  # fmt: skip
    theirs = reference(model, records)
    assert theirs.std() > 5, "flat pictures would prove nothing"
    assert worst(np.stack(made), theirs) <= 1
