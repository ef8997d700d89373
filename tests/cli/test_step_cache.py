"""--step-cache from outside: what rows and directories say, what is refused, and that off leaves all as it was."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxcli
from fluxcli.core.step_cache import PRESETS, StepCache
from fluxcli.models.checkpoints import BUILT_IN
from fluxcli.models.step_cache import read
from tests.cli.conftest import files
from tests.conftest import read_rows, write_rows

SMALL = ("-m", "tiny", "--width", 64, "--height", 64)
ROWS = [{"id": "a", "prompt": "a red circle"}, {"id": "b", "prompt": "a blue square", "steps": 12}]
OWN = read(BUILT_IN / "tiny" / "step_cache.json")


def pixels(directory: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(directory / "images" / f"{name}.png")).astype(int)


@pytest.fixture
def job(inside, tmp_path: Path):
    """Runs a job of rows into `out` with these options."""
    write_rows(tmp_path / "in.jsonl", ROWS)
    return lambda *options, out="out": inside("batch", "in.jsonl", "-o", out, *SMALL, *options)


def test_rows_say_how_they_were_made(job, tmp_path: Path) -> None:
    assert job("--step-cache", "balanced").returncode == 0
    for row, steps in zip(read_rows(tmp_path / "out" / "manifest.jsonl")[::-1], (10, 12), strict=True):
        mask = StepCache("balanced", OWN).mask(steps)
        assert (row["step_cache"], row["evaluated_steps"]) == (mask, mask.count("1"))
        assert list(row)[7:11] == ["num_inference_steps", "guidance_scale", "step_cache", "evaluated_steps"]
    assert job("--step-cache", "balanced").stderr.startswith("nothing to do: 2 images were done before")


def test_off_leaves_rows_and_directories_as_they_were(job, tmp_path: Path) -> None:
    """A directory made before there was a step cache is one made with off."""
    assert job("--steps", 2, "--limit", 1).returncode == 0
    assert not re.search("step_cache|evaluated", (tmp_path / "out" / "job.json").read_text())
    (row,) = read_rows(tmp_path / "out" / "manifest.jsonl")
    assert not {"step_cache", "evaluated_steps"} & row.keys()
    before = files(tmp_path / "out")
    refused = job("--steps", 2, "--step-cache", "11")
    assert refused.returncode == 1 and "--step-cache was off, now 11\n" in refused.stderr
    assert files(tmp_path / "out") == before
    assert job("--steps", 2, "--step-cache", "off").returncode == 0
    assert len(read_rows(tmp_path / "out" / "manifest.jsonl")) == 2


def test_another_mask_is_another_job(job, tmp_path: Path) -> None:
    assert job("--steps", 3, "--step-cache", "101", "--limit", 1).returncode == 0
    for option, told in (("110", "was 101, now 110"), ("off", "was 101, now off")):
        refused = job("--steps", 3, "--step-cache", option)
        assert refused.returncode == 1 and f"--step-cache {told}" in refused.stderr
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"ratios": [1.0] * 10}))
    assert job("--step-cache", "fast", "--limit", 1, out="other").returncode == 0
    refused = job("--step-cache", "own.json:fast", out="other")
    assert re.search(r"--step-cache was fast \(ratios \w{8}\), now fast \(ratios \w{8}\)", refused.stderr)


def test_a_row_that_the_mask_does_not_fit_fails_before_the_model_is_loaded(job, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [*ROWS, {"id": "c", "prompt": "x", "steps": 5}])
    done = job("--step-cache", "1010101011", "--json")
    assert done.returncode == 3 and done.json["images"] == 1
    failures = {row["id"]: row["error"] for row in read_rows(tmp_path / "out" / "failures.jsonl")}
    assert failures.keys() == {"b", "c"} and {error["type"] for error in failures.values()} == {"invalid_row"}
    assert "mask of 10 steps, and an image with 12 cannot have it" in failures["b"]["message"]
    assert done.stderr.index("line 3: steps: ") < done.stderr.index("loading tiny")
    few = job("--step-cache", "fine", "--strict", out="strict")
    assert few.returncode == 1 and "line 3" in few.stderr and "needs 9 steps or more" in few.stderr
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--step-cache", "quick"), "--step-cache quick: give off, fine, balanced, fast"),
        (("--step-cache", "fast", "--steps", 8), "needs 9 steps or more: fewer have none to spare; got 8"),
        (("--step-cache", "1010"), "a mask of 4 steps, and an image with 10 cannot have it"),
        (("--step-cache", "fast", "-m", "random:flux-schnell"), "distilled for few steps"),
        (("--step-cache", "missing.json:fast"), "there is no file missing.json"),
    ],
)
@pytest.mark.parametrize("command", ["batch", "gen", "warmup", "bench"])
def test_what_cannot_be_is_wrong_usage_before_any_work(
    command: str, options: tuple[object, ...], message: str, inside, tmp_path: Path
) -> None:
    write_rows(tmp_path / "in.jsonl", ROWS)
    given = {"batch": ("in.jsonl", "-o", "out"), "gen": ("a prompt",), "warmup": ("in.jsonl",), "bench": ()}[command]
    done = inside(command, *given, "-m", "tiny", *options)
    assert done.returncode == 2 and message in done.stderr and "loading" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_warming_up_is_for_both_kinds_of_steps(inside) -> None:
    done = inside("warmup", *SMALL, "--size", "64x64", "--text-lengths", 32, "--step-cache", "fine", "--json")
    assert done.returncode == 0 and len(done.json["shapes"]) == 1


def test_schnell_takes_a_mask(inside, tmp_path: Path, pipeline) -> None:
    from tests.pipelines import SCHNELL

    write_rows(tmp_path / "in.jsonl", ROWS[:1])
    model = pipeline(SCHNELL)
    done = inside("batch", "in.jsonl", "-o", "out", *SMALL, "-m", model, "--steps", 3, "--step-cache", "101")
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "out" / "manifest.jsonl")[0]["step_cache"] == "101"


def test_the_plan_tells_what_is_left_to_do(job) -> None:
    done = job("--step-cache", "fast", "--dry-run", "--json")
    masks = {steps: StepCache("fast", OWN).mask(steps) for steps in (10, 12)}
    assert {each["num_inference_steps"]: each["step_cache"] for each in done.json["groups"]} == masks
    evaluated = sum(mask.count("1") for mask in masks.values())
    assert evaluated / 22 < done.json["denoising"] < (evaluated + 1) / 22
    table = job("--step-cache", "fast", "--dry-run").stderr
    assert f"10 ({masks[10].count('1')} evaluated)" in table
    assert f"the step cache leaves {done.json['denoising']:.1%} of the denoiser's work" in table
    assert "denoising" not in job("--dry-run", "--json").json


def test_gen_batch_and_python_make_one_image(job, inside, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "a red circle", "seed": 5}])
    assert job("--step-cache", "fast").returncode == 0
    made = inside("gen", "a red circle", *SMALL, "--seed", 5, "--step-cache", "fast", "-o", "a.png", "--json")
    image = made.json["images"][0]
    assert image["step_cache"] == StepCache("fast", OWN).mask(10) and image["evaluated_steps"] == 4
    plain = pixels(tmp_path / "out", "a")
    assert (np.asarray(Image.open(tmp_path / "a.png")) == plain).all()
    model = fluxcli.load("tiny", device="cpu", step_cache="fast")
    (drawn,) = model.generate("a red circle", seed=5, width=64, height=64)
    assert np.abs(np.asarray(drawn).astype(int) - plain).max() <= 1
    with pytest.raises(fluxcli.FluxcliError, match="distilled for few steps"):
        fluxcli.load("random:flux-schnell", device="cpu", step_cache="fast")
    with pytest.raises(fluxcli.FluxcliError, match="needs 9 steps or more"):
        model.generate("a red circle", steps=4)
    totals = fluxcli.Job(
        tmp_path / "in.jsonl", tmp_path / "out", "tiny", device="cpu", width=64, height=64, step_cache="fast"
    ).run()
    assert (totals["done_before"], totals["images"]) == (1, 0)


def test_calibrating_gives_a_file_that_a_job_takes(job, inside, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a red circle"}, {"prompt": "a star", "n": 2, "steps": 3}])
    done = inside("calibrate", "in.jsonl", "-o", "own.json", *SMALL, "--steps", 9, "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "own.json").read_text())
    assert written["model"] == "tiny" and written["images"] == 3  # two of them of one row
    assert written["ratios"] == pytest.approx(done.json["ratios"], abs=1e-4)
    assert len(written["ratios"]) == 9 and written["ratios"][0] == 1
    masks = {name: StepCache(name, read(tmp_path / "own.json")).mask(9) for name in PRESETS}
    assert done.json["masks"] == masks and all(mask in done.stderr for mask in masks.values())
    again = inside("calibrate", "in.jsonl", "-o", "own.json", *SMALL)
    assert again.returncode == 1 and "exists already" in again.stderr
    write_rows(tmp_path / "in.jsonl", ROWS[:1])
    assert job("--steps", 9, "--step-cache", "own.json:fine").returncode == 0
    assert read_rows(tmp_path / "out" / "manifest.jsonl")[0]["step_cache"] == masks["fine"]


def test_calibrating_needs_good_rows(inside, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": ""}])
    done = inside("calibrate", "in.jsonl", "-o", "own.json", *SMALL)
    assert done.returncode == 1 and "in.jsonl, line 1: prompt is empty" in done.stderr
    write_rows(tmp_path / "in.jsonl", ROWS)
    assert inside("calibrate", "in.jsonl", "-o", "own.json", *SMALL, "--steps", 1).returncode == 2
    done = inside("calibrate", "in.jsonl", "-o", "nowhere/own.json", *SMALL)
    assert done.returncode == 1 and "there is no directory nowhere" in done.stderr and "loading" not in done.stderr
    assert not (tmp_path / "own.json").exists()


def test_the_built_in_models_ratios_are_its_own(inside) -> None:
    prompts = Path(__file__).parents[2] / "jobs" / "tiny" / "calibrate.jsonl"
    done = inside("calibrate", prompts, "-o", "own.json", "-m", "tiny", "--steps", 28, "--json")
    assert done.json["ratios"] == pytest.approx(list(OWN), abs=1e-3)


def test_bench_tells_whole_images_and_a_reused_step(inside, monkeypatch) -> None:
    from fluxcli.bench import bench

    monkeypatch.setattr(bench, "_TURN_S", 0.01)
    monkeypatch.setattr(bench, "_JOB_S", 0.1)
    small = ("-m", "tiny", "--size", "64x64", "--batch-size", 2, "--text-lengths", 32, "--steps", 9)
    data = inside("bench", *small, "--step-cache", "fast", "--json").json
    assert data["mask"] == StepCache("fast", OWN).mask(9) and data["step_cache"].startswith("fast (ratios ")
    (row,) = data["shapes"]
    assert row["reused"]["share"] == pytest.approx(row["reused"]["ms"] / row["ms_per_step"])
    assert 0 < row["reused"]["share"] < 0.7 and row["images_per_s"] > 0
    both = inside("bench", *small, "--step-cache", "fast", "--quantization", "fp8", "--json").json
    assert both["quantization"] == "fp8" and both["shapes"][0]["reused"]["ms"] > 0


def test_a_mask_goes_with_8_bits(job, inside, tmp_path: Path) -> None:
    """And a batch's images are then too those of their rows alone."""
    write_rows(tmp_path / "in.jsonl", [{"id": id, "prompt": f"a {id} circle"} for id in ("red", "blue")])
    both = ("--steps", 4, "--step-cache", "1101", "--quantization", "fp8")
    assert job(*both).returncode == job(*both, "--batch-size", 1, out="alone").returncode == 0
    for row in read_rows(tmp_path / "out" / "manifest.jsonl"):
        assert (row["quantization"], row["step_cache"], row["evaluated_steps"]) == ("fp8", "1101", 3)
        assert np.abs(pixels(tmp_path / "out", row["id"]) - pixels(tmp_path / "alone", row["id"])).max() <= 1
    refused = job("--steps", 4, "--quantization", "fp8")
    assert "--step-cache was 1101, now off" in refused.stderr and "quantization" not in refused.stderr
