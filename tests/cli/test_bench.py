"""`fluxcli bench`: one JSON object that agrees with itself, a table for people, and errors that say what to do."""

import json
from statistics import median
from typing import Any

import pytest
import torch

from fluxcli.bench import bench, peers
from fluxcli.core.errors import OutOfMemory
from fluxcli.core.records import ShapeKey
from fluxcli.engine.engine import Engine

SMALL = ("-m", "tiny", "--size", "64x64", "--text-lengths", 32, "--steps", 2)
SHAPE_KEYS = {
    "batch_size", "height", "width", "text_length", "attention", "warm_up", "ms_per_step", "ms_per_image_step",
    "tflops", "floor", "percent_of_floor", "peers", "ratio", "images_per_s", "job", "components",
    "peak_memory", "rounds_s",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    """Of the tests in this process; the machine is not what they are about."""
    monkeypatch.setattr(bench, "_TURN_S", 0.01)
    monkeypatch.setattr(bench, "_JOB_S", 0.5)


@pytest.fixture
def eager_only(monkeypatch) -> None:
    """Leaves the compiled peer to the slow test: compiling takes a minute on a slow CPU."""
    monkeypatch.setitem(peers.PEERS, "diffusers", {"diffusers": peers.PEERS["diffusers"]["diffusers"]})


def test_one_json_object_that_agrees_with_itself(inside, eager_only) -> None:
    result = inside("bench", *SMALL, "--batch-size", "2,1", "--size", "96x64", "--vs", "diffusers", "--json")
    assert result.returncode == 0, result.stderr
    data = result.json
    assert result.stdout == json.dumps(data) + "\n"
    assert (data["model"], data["device"], data["dtype"], data["steps"]) == ("tiny", "cpu", "float32", 2)
    assert data["versions"].keys() == {
        "fluxcli", "python", "torch", "cuda", "driver", "diffusers", "transformers",
    }  # fmt: skip
    assert data["versions"]["torch"] == torch.__version__
    assert data["clocks"] == {at: {"unavailable": "no GPU is in use"} for at in ("before", "after")}
    assert data["cold_start"] is None
    assert [(row["batch_size"], row["width"], row["height"], row["text_length"]) for row in data["shapes"]] == [
        (1, 64, 64, 32), (1, 96, 64, 32), (2, 64, 64, 32), (2, 96, 64, 32),
    ]  # fmt: skip
    for row in data["shapes"]:
        check_row(row, data["rounds"], data["steps"])
    assert data["parity"]["ours_to_diffusers"] < 1e-4 < data["parity"]["change_by_denoising"]


def test_in_8_bits_the_peers_keep_their_own_weights(inside, eager_only) -> None:
    result = inside("bench", *SMALL, "--batch-size", 1, "--quantization", "fp8", "--vs", "diffusers", "--json")
    assert result.returncode == 0, result.stderr
    data = result.json
    assert data["quantization"] == "fp8" and "float32 and fp8" in result.stderr
    assert data["parity"]["diffusers_to_float32"] == 0 and data["parity"]["steps"] == 2
    assert 1e-3 < data["parity"]["ours_to_float32"] < 0.5  # random inputs, and weights that never met such


def test_torchao_needs_its_package_and_a_gpu(inside, monkeypatch) -> None:
    for found, told in ((None, "is not installed; pip install torchao"), (object(), "need a CUDA GPU")):
        monkeypatch.setattr(peers, "find_spec", lambda name, found=found: found)
        result = inside("bench", *SMALL, "--vs", "torchao")
        assert result.returncode == 1 and told in result.stderr and "loading" not in result.stderr


def check_row(row: dict[str, Any], rounds: int, steps: int) -> None:
    assert row.keys() == SHAPE_KEYS
    assert (row["attention"], row["peak_memory"], row["warm_up"]["state"]) == ("sdpa", None, "nothing to compile")
    times = row["rounds_s"]
    assert times.keys() == {"fluxcli", "products", "attention", "diffusers"}
    assert {len(each) for each in times.values()} == {rounds}
    ms = {name: 1e3 * median(each) for name, each in times.items()}
    assert row["ms_per_step"] == pytest.approx(ms["fluxcli"])
    assert row["ms_per_image_step"] == pytest.approx(ms["fluxcli"] / row["batch_size"])
    assert row["floor"] == {
        "ms": pytest.approx(ms["products"] + ms["attention"]),
        "products_ms": pytest.approx(ms["products"]),
        "attention_ms": pytest.approx(ms["attention"]),
        "attention": "sdpa",
    }
    assert row["percent_of_floor"] == pytest.approx(100 * row["floor"]["ms"] / row["ms_per_step"])
    assert row["peers"]["diffusers"]["ms_per_step"] == pytest.approx(ms["diffusers"])
    assert row["ratio"] == {"diffusers": pytest.approx(ms["fluxcli"] / ms["diffusers"])}
    job, components = row["job"], row["components"]
    assert job["images"] == job["batches"] * row["batch_size"]
    assert row["images_per_s"] == pytest.approx(job["images"] / job["seconds"])
    # On a CPU nothing overlaps, so the stages add up to the job. The bounds are wide for machines that do other things
    # meanwhile; they are narrow enough for a wrong unit or share.
    stages = sum(components[name] for name in ("encode_s", "denoise_s", "decode_s"))
    assert 0.2 < stages * row["images_per_s"] <= 2
    assert all(seconds > 0 for seconds in components.values())
    # The steps timed alone are those of the loop.
    assert 0.15 < components["denoise_s"] / (steps * row["ms_per_image_step"] / 1e3) < 6


def test_the_table_is_for_people_and_stdout_stays_empty(inside, eager_only) -> None:
    result = inside("bench", *SMALL, "--batch-size", 1, "--vs", "diffusers")
    assert (result.returncode, result.stdout) == (0, "")
    for part in ("tiny on cpu", "64x64", "% of floor", "ratio", "encode s", "images/s", "relative error"):
        assert part in result.stderr


def test_the_default_is_a_batch_of_one_and_the_default_batch_at_the_reference_length(inside, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(bench.Bench, "run", lambda self, *rest: seen.append(self) or (0, RESULT))
    assert inside("bench", "-m", "tiny", "--json").json == RESULT
    assert seen[0].keys == [ShapeKey(1, 128, 128, 512), ShapeKey(8, 128, 128, 512)]
    assert (seen[0].steps, seen[0].vs, seen[0].cold_start) == (10, None, False)


RESULT = {
    "model": "tiny", "device": "cpu", "dtype": "float32", "compile": False, "rounds": 5, "steps": 1, "shapes": [],
    "versions": {"torch": "0", "cuda": None, "diffusers": "0"}, "cold_start": None, "parity": None,
}  # fmt: skip


def test_a_shape_that_does_not_fit_says_so_and_costs_no_other(inside, monkeypatch) -> None:
    submit = Engine.submit

    def small(self, batch):
        if batch.key.batch_size > 2:
            raise OutOfMemory(f"the device has no memory for {batch.key}")
        return submit(self, batch)

    monkeypatch.setattr(Engine, "submit", small)
    result = inside("bench", *SMALL, "--batch-size", "1,4", "--json")
    assert result.returncode == 1
    fits, large = result.json["shapes"]
    assert fits.keys() == SHAPE_KEYS
    assert large["error"] == "the device has no memory for 4 x 64x64, text 32"
    assert "ms_per_step" not in large
    assert result.stderr.splitlines()[-1] == "4 x 64x64, text 32: the device has no memory for 4 x 64x64, text 32"


def test_a_peer_that_does_not_fit_says_so_and_ours_is_told(inside, eager_only, monkeypatch) -> None:
    def full(self, inputs, sigma, dt):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(peers.Diffusers, "step", full)
    result = inside("bench", *SMALL, "--batch-size", 1, "--vs", "diffusers", "--json")
    assert result.returncode == 1
    row = result.json["shapes"][0]
    assert row["peers"] == {"diffusers": {"error": "no memory left"}}
    assert row["ratio"] == {}
    assert row["ms_per_step"] > 0
    assert result.stderr.splitlines()[-1] == "1 x 64x64, text 32, diffusers: no memory left"


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--vs", "comfyui"), 2, "--vs"),
        (("--batch-size", "0"), 2, "batch sizes must be 1 to 1024"),
        (("--batch-size", "1,two"), 2, "--batch-size"),
        (("--text-lengths", "513"), 2, "text lengths must be 1 to 512"),
        (("--size", "100x64"), 2, "--size"),
        (("--attention", "cudnn"), 1, "--attention cudnn: it needs a CUDA GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(inside, options, code: int, told: str) -> None:
    result = inside("bench", "-m", "tiny", *options, "--json")
    assert result.returncode == code
    assert told in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert result.stdout == ""


@pytest.mark.slow
def test_compiled_peers_and_cold_starts_from_outside(command, tmp_path) -> None:
    options = ("-m", "tiny", "--size", "64x64", "--text-lengths", 32, "--steps", 1, "--batch-size", 1, "--compile")
    environment = {"FLUXCLI_CACHE": str(tmp_path / "cache")}
    result = command("bench", *options, "--vs", "diffusers", "--cold-start", "--json", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    data = result.json
    (row,) = data["shapes"]
    assert row["ratio"].keys() == row["peers"].keys() == {"diffusers", "diffusers-compiled"}
    states = {name: start["shapes"][0]["state"] for name, start in data["cold_start"].items()}
    assert states == {"cold": "cold", "cached": "cached"}
    assert row["warm_up"]["cold_s"] > row["warm_up"]["cached_s"] > 0
