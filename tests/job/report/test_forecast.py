"""What --dry-run foretells is what the images that are there took, and says nothing of others."""

import json
from pathlib import Path

from fluxcli.core.records import Group
from fluxcli.job.report.forecast import forecast
from tests.job import harness

MADE = Group(64, 64, 64, 2)


def test_a_plan_takes_what_its_shapes_took(tmp_path: Path) -> None:
    rows = harness.write_input(tmp_path / "rows.jsonl")
    assert harness.run(rows, tmp_path / "job") == 0  # .2 s of two steps, .4 s before and after, by its engine's clock
    size = sum(path.stat().st_size for path in (tmp_path / "job" / "images").iterdir()) / harness.ROWS
    for groups, workers, seconds, images in (
        ([MADE] * 10, 1, 6.0, 10),
        ([MADE] * 10, 4, 1.5, 10),
        ([MADE._replace(num_inference_steps=20)] * 10, 1, 24.0, 10),
        ([MADE] * 10 + [MADE._replace(height=80)] * 5, 1, 6.0, 10),
    ):
        assert forecast(tmp_path / "job", groups, workers) == {
            "images": images,
            "seconds": seconds,
            "device_hours": round(seconds * workers / 3600, 4),
            "bytes": round(images * size),
        }
    assert forecast(tmp_path / "job", [MADE._replace(height=80)], 1) is None
    assert forecast(tmp_path / "nowhere", [MADE], 1) is None


def test_only_a_shapes_last_run_counts_and_nonsense_does_not(tmp_path: Path) -> None:
    rows = harness.write_input(tmp_path / "rows.jsonl")
    assert harness.run(rows, tmp_path / "job") == 0
    manifest = tmp_path / "job" / "manifest.jsonl"
    made = harness.manifest(tmp_path / "job")
    for row in made[-3:]:
        row["run"] = 1
        row["timing"] = {"encode_s": 0.0, "denoise_s": 4.0, "decode_s": 1.0}
    made[-2]["timing"] = {"encode_s": "long", "denoise_s": 4.0, "decode_s": 1.0}
    made[-1]["timing"] = {"encode_s": -1e300, "denoise_s": 4.0}
    manifest.write_text("".join(json.dumps(row) + "\n" for row in made))
    told = forecast(tmp_path / "job", [MADE] * 2, 1)
    assert told is not None and told["seconds"] == 10.0
