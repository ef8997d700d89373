"""--lora and the row key `lora`, as a user meets them."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcli.job.report.verify import verify
from tests.adapters import FORMATS, TEXT_FORMATS, Maker, reference
from tests.conftest import read_rows, write_rows
from tests.engine.test_parity import records, worst
from tests.pipelines import DEV

SMALL = ("--width", 64, "--height", 64, "--steps", 2, "--text-lengths", 16, "--dtype", "float32")
NAMES = ("style", "detail", "pose", "words")


@pytest.fixture
def folder(pipeline, tmp_path: Path) -> Path:
    """A directory with adapters in it."""
    for seed, name in enumerate(NAMES):
        format = TEXT_FORMATS["kohya"] if name == "words" else FORMATS[("diffusers, attention", "kohya", "xlabs")[seed]]
        format(Maker(pipeline(DEV), seed)).write(tmp_path / f"{name}.safetensors")
    return tmp_path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def manifest(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_rows(directory / "manifest.jsonl")}


def test_gen_draws_what_diffusers_draws_with_the_sum_of_two(inside, pipeline, folder: Path) -> None:
    given = ("gen", "a red circle", "-m", pipeline(DEV), *SMALL, "--seed", 1000)
    both = ("--lora", "style.safetensors=0.5", "--lora", folder / "detail.safetensors")
    done = inside(*given, *both, "-o", "with.png", "--json")
    assert done.returncode == 0, done.stderr
    assert inside(*given, "-o", "without.png").returncode == 0
    made = [FORMATS[name](Maker(pipeline(DEV), seed)) for seed, name in enumerate(("diffusers, attention", "kohya"))]
    (row,) = records(DEV, 1, 64, 64, 16, 2)
    (theirs,) = reference(pipeline(DEV), [row], (made[0].differences, 0.5), (made[1].differences, 1.0))
    assert worst(picture(folder / "with.png"), theirs) <= 1 < 10 < worst(picture(folder / "without.png"), theirs)
    assert done.json["images"][0]["lora"] == [
        {"path": "style.safetensors", "sha256": sha256(folder / "style.safetensors"), "scale": 0.5},
        {"path": f"{folder}/detail.safetensors", "sha256": sha256(folder / "detail.safetensors"), "scale": 1.0},
    ]
    text = Image.open(folder / "with.png").info["parameters"]
    assert 'Lora: "style.safetensors:0.5, detail.safetensors:1"' in text and str(folder) not in text


def sixty(sets: list[Any]) -> list[dict[str, Any]]:
    """Rows over these sets, shuffled."""
    rows = [
        {"id": f"{number}-{turn}", "prompt": f"a circle, {turn % 7}", "seed": 100 * number + turn, "lora": adapters}
        for number, adapters in enumerate(sets)
        for turn in range(60 // len(sets))
    ]
    random.Random(0).shuffle(rows)
    return rows


SETS: list[Any] = [
    [],
    "style.safetensors",
    [{"path": "style.safetensors", "scale": 0.5}, {"path": "detail.safetensors"}],
    [{"path": "pose.safetensors", "scale": -0.7}],
    ["words.safetensors", {"path": "style.safetensors", "scale": 0.3}],
]


@pytest.fixture(scope="module")
def singles(pipeline, tmp_path_factory) -> Callable[[Path], dict[str, np.ndarray]]:
    """Sixty runs of one row each, by a new engine for each set and an only batch for each row."""
    from dataclasses import replace

    from fluxcli.engine.engine import Engine
    from fluxcli.engine.runtime.device import resolve as resolve_device
    from fluxcli.job.input.intake import OneRow, take_in
    from fluxcli.job.single import made
    from fluxcli.models.checkpoints import resolve
    from fluxcli.models.tokenizers import Tokenizers

    def run(folder: Path) -> dict[str, np.ndarray]:
        checkpoint = resolve(str(pipeline(DEV)))
        defaults = replace(checkpoint.row_defaults(), width=64, height=64, num_inference_steps=2)
        found = {}
        for adapters in SETS:
            engine = Engine(checkpoint, resolve_device("cpu", "float32", None, "auto"))
            for row in sixty(SETS):
                if row["lora"] != adapters:
                    continue
                given = [adapters] if isinstance(adapters, str) else adapters
                paths = [{**({"path": each} if isinstance(each, str) else each)} for each in given]
                full = [{**each, "path": str(folder / each["path"])} for each in paths]
                source = OneRow({**row, "lora": full})
                intake = take_in(source, defaults, (16,), Tokenizers(checkpoint.tokenizers).count)
                ((_, result),) = made(engine, intake.records([0]), 1, defaults.step_cache)
                found[row["id"]] = result.pixels[0].copy()
        return found

    return run


@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_sixty_rows_over_five_sets_are_sixty_single_runs(
    inside, pipeline, folder: Path, singles, workers: int | None
) -> None:
    rows = sixty(SETS)
    write_rows(folder / "in.jsonl", rows)
    own = () if workers is None else ("--workers", workers)
    given = ("batch", "in.jsonl", "-o", "out", "-m", pipeline(DEV), *SMALL, "--batch-size", 5, *own)
    plan = inside(*given, "--dry-run", "--json").json
    assert (plan["batches"], plan["adapters"]["swaps"]) == (15, 4)
    assert [each["images"] for each in plan["adapters"]["sets"]] == [12] * 5
    assert plan["adapters"]["sets"][0]["lora"] == []
    done = inside(*given)
    assert done.returncode == 0, done.stderr
    made, alone = manifest(folder / "out"), singles(folder)
    assert made.keys() == alone.keys() and len(made) == 60
    for id, image in alone.items():
        assert worst(picture(folder / "out" / made[id]["file_name"]), image) <= 1, id
    for row in rows:
        told = made[row["id"]].get("lora", [])
        wanted = [row["lora"]] if isinstance(row["lora"], str) else row["lora"]
        assert [each["path"] for each in told] == [each if isinstance(each, str) else each["path"] for each in wanted]
        assert all(each["sha256"] == sha256(folder / each["path"]) for each in told)
    of_set = {row["id"]: json.dumps(row["lora"]) for row in rows}
    batches: dict[int, set[str]] = {}
    for id, row in made.items():
        batches.setdefault(row["batch"]["index"], set()).add(of_set[id])
    assert all(len(each) == 1 for each in batches.values()), "one set a batch"
    assert not verify(folder / "out").problems


def test_an_adapter_changes_what_is_drawn_for_its_rows_alone(inside, pipeline, folder: Path) -> None:
    rows = [{"id": name, "prompt": "a red circle", "seed": 7} for name in ("none", "jobs", "own", "again")]
    rows[0]["lora"], rows[2]["lora"], rows[3]["lora"] = [], "pose.safetensors", ["style.safetensors"]
    write_rows(folder / "in.jsonl", rows)
    given = ("batch", "in.jsonl", "-m", pipeline(DEV), *SMALL, "--batch-size", 4)
    assert inside(*given, "-o", "out", "--lora", "style.safetensors").returncode == 0
    images = {row["id"]: picture(folder / "out" / "images" / f"{row['id']}.png") for row in rows}
    assert (images["jobs"] == images["again"]).all(), "the option's and the row's are one set"
    assert worst(images["none"], images["jobs"]) > 10 < worst(images["own"], images["jobs"])
    identity = json.loads((folder / "out" / "job.json").read_text())["options"]
    assert identity["lora"] == [f"{sha256(folder / 'style.safetensors')}=1"]


def test_a_job_goes_on_with_its_adapters_and_with_no_others(inside, pipeline, folder: Path) -> None:
    rows = sixty(SETS)[:12]
    write_rows(folder / "in.jsonl", rows)
    given = ("batch", "in.jsonl", "-o", "out", "-m", pipeline(DEV), *SMALL)
    assert inside(*given, "--limit", 5).returncode == 0
    first = (folder / "out" / "manifest.jsonl").read_bytes()
    assert inside(*given).returncode == 0
    whole = (folder / "out" / "manifest.jsonl").read_bytes()
    assert whole.startswith(first) and len(manifest(folder / "out")) == 12
    done = inside(*given)
    assert done.returncode == 0 and "nothing to do: 12 images were done before" in done.stderr
    # Elsewhere, and under another name, it is the same adapter.
    (folder / "there").mkdir()
    moved = [{**row, "lora": json.loads(json.dumps(row["lora"]).replace("style.", "there/renamed."))} for row in rows]
    (folder / "style.safetensors").rename(folder / "there" / "renamed.safetensors")
    write_rows(folder / "in.jsonl", moved)
    done = inside(*given)
    assert done.returncode == 0 and "nothing to do" in done.stderr
    # Another scale, or another file under its name, is another image.
    for changed in (
        [{**row, "lora": [{"path": "pose.safetensors", "scale": 0.1}]} for row in moved],
        [{**row, "lora": []} for row in moved],
    ):
        write_rows(folder / "in.jsonl", changed)
        done = inside(*given, "--dry-run", "--json")
        told = {failure["error"]["type"] for failure in done.json["failures"]}
        assert told == {"changed_row"} and done.json["failed"] > 5
    FORMATS["kohya"](Maker(pipeline(DEV), 99)).write(folder / "pose.safetensors")
    write_rows(folder / "in.jsonl", moved)
    done = inside(*given, "--dry-run", "--json")
    assert {failure["id"] for failure in done.json["failures"]} == {
        row["id"] for row in rows if "pose" in str(row["lora"])
    }
    assert (folder / "out" / "manifest.jsonl").read_bytes() == whole
    # The whole job's are part of what the job is.
    done = inside(*given, "--lora", "detail.safetensors=0.5")
    assert done.returncode == 1
    assert f"--lora was none, now {sha256(folder / 'detail.safetensors')}=0.5" in done.stderr


def test_a_bad_adapter_of_a_row_costs_that_row_and_is_told_before_the_model_is_loaded(
    inside, pipeline, folder: Path, monkeypatch
) -> None:
    (folder / "page.safetensors").write_text("<!doctype html><p>")
    torch.save({}, folder / "pickle.safetensors")
    (folder / "sdxl.safetensors").write_bytes(
        (folder / "detail.safetensors").read_bytes().replace(b"double_blocks", b"input__blocks")
    )
    rows = [{"id": name, "prompt": "a", "lora": f"{name}.safetensors"} for name in ("gone", "page", "pickle", "sdxl")]
    rows.append({"id": "good", "prompt": "a", "lora": "style.safetensors"})
    write_rows(folder / "in.jsonl", rows)
    given = ("batch", "in.jsonl", "-o", "out", "-m", pipeline(DEV), *SMALL)
    done = inside(*given)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    failures = {row["id"]: row["error"] for row in read_rows(folder / "out" / "failures.jsonl")}
    assert manifest(folder / "out").keys() == {"good"} and {each["type"] for each in failures.values()} == {
        "invalid_row"
    }
    assert failures["gone"]["message"].startswith("lora: gone.safetensors: no such file")
    assert "it is a web page" in failures["page"]["message"]
    assert "it is a pickle under another name" in failures["pickle"]["message"]
    assert "lora_unet_input__blocks_" in failures["sdxl"]["message"]
    told = done.stderr.index("line 1: lora: gone.safetensors")
    assert told < done.stderr.index("loading ")
    strict = inside(*given, "-o", "strict", "--strict")
    assert strict.returncode == 1 and "loading " not in strict.stderr and not (folder / "strict").exists()
    # Put right, the rows are tried again.
    for name in ("gone", "page", "pickle", "sdxl"):
        (folder / f"{name}.safetensors").write_bytes((folder / "pose.safetensors").read_bytes())
    assert inside(*given).returncode == 0 and len(manifest(folder / "out")) == 5


@pytest.mark.parametrize("command", ["gen", "batch", "warmup", "calibrate"])
@pytest.mark.parametrize(
    ("value", "code", "told"),
    [
        ("gone.safetensors", 2, "gone.safetensors: no such file"),
        ("gone.safetensors=0.5", 2, "gone.safetensors: no such file"),
        (".", 2, ".: no such file"),
        ("style.safetensors=high", 2, "'high' is not a finite number"),
        ("style.safetensors=nan", 2, "'nan' is not a finite number"),
        ("page.safetensors", 1, "page.safetensors: cannot be read: it is a web page"),
        ("big.safetensors", 1, "big.safetensors: "),
    ],
)
def test_the_jobs_own_is_told_before_the_model_is_loaded(
    inside, pipeline, folder: Path, command: str, value: str, code: int, told: str
) -> None:
    (folder / "page.safetensors").write_text("<!doctype html><p>")
    (folder / "big.safetensors").write_bytes((2**40).to_bytes(8, "little"))
    write_rows(folder / "in.jsonl", [{"prompt": "a"}])
    words = [command, "a" if command == "gen" else "in.jsonl"]
    words += ["-o", "out"] if command != "warmup" else []
    done = inside(*words, "-m", pipeline(DEV), *SMALL, "--lora", value)
    assert done.returncode == code and told in done.stderr
    assert "loading " not in done.stderr and "Traceback" not in done.stderr and not (folder / "out").exists()


def test_a_path_with_an_equals_sign_is_a_path_where_it_is_a_file(inside, pipeline, folder: Path) -> None:
    (folder / "a=2").write_bytes((folder / "style.safetensors").read_bytes())
    given = ("gen", "a", "-m", pipeline(DEV), *SMALL, "--json")
    for value, scale in (("a=2", 1.0), ("a=2=0.5", 0.5)):
        done = inside(*given, "--lora", value, "-o", "out")
        assert done.json["images"][0]["lora"][0]["scale"] == scale, done.stderr


def test_a_config_file_names_one_or_several(inside, pipeline, folder: Path) -> None:
    write_rows(folder / "in.jsonl", [{"prompt": "a"}])
    for value, count in (('"style.safetensors=0.5"', 1), ('["style.safetensors", "pose.safetensors=0.2"]', 2)):
        (folder / "job.toml").write_text(f"lora = {value}\n")
        plan = inside("batch", "in.jsonl", "-m", pipeline(DEV), *SMALL, "--config", "job.toml", "--dry-run", "--json")
        assert len(plan.json["adapters"]["sets"][-1]["lora"]) == count, plan.stderr


def test_a_dry_run_shows_sets_and_swaps(inside, pipeline, folder: Path) -> None:
    write_rows(folder / "in.jsonl", sixty(SETS))
    done = inside("batch", "in.jsonl", "-m", pipeline(DEV), *SMALL, "--dry-run")
    assert "adapter sets: 5, swaps: 4" in done.stderr
    assert "  12 images: none" in done.stderr
    assert "  12 images: style.safetensors x 0.5, detail.safetensors x 1" in done.stderr
    write_rows(folder / "in.jsonl", [{"prompt": "a"}])
    done = inside("batch", "in.jsonl", "-m", pipeline(DEV), *SMALL, "--dry-run")
    assert "adapter" not in done.stderr


def test_an_adapter_that_changes_while_the_job_runs_ends_it_and_loses_nothing(
    inside, pipeline, folder: Path, monkeypatch
) -> None:
    from fluxcli.engine.engine import Engine

    rows = [{"id": str(n), "prompt": "a", "lora": f"{name}.safetensors"} for n, name in enumerate(("style", "pose"))]
    write_rows(folder / "in.jsonl", rows)
    submit = Engine.submit

    def changing(self, batch):
        flight = submit(self, batch)
        FORMATS["kohya"](Maker(pipeline(DEV), 99)).write(folder / "pose.safetensors")
        return flight

    monkeypatch.setattr(Engine, "submit", changing)
    given = ("batch", "in.jsonl", "-o", "out", "-m", pipeline(DEV), *SMALL)
    done = inside(*given)
    assert done.returncode == 1 and "pose.safetensors: has changed since the job looked at it" in done.stderr
    assert manifest(folder / "out").keys() == {"0"}
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert inside(*given).returncode == 0 and manifest(folder / "out").keys() == {"0", "1"}


def test_warmup_and_calibrate_take_rows_with_adapters(inside, pipeline, folder: Path) -> None:
    write_rows(folder / "in.jsonl", [{"prompt": "a", "lora": "style.safetensors"}, {"prompt": "b"}])
    model = ("-m", pipeline(DEV), *SMALL)
    warm = inside("warmup", "in.jsonl", *model, "--json")
    assert warm.returncode == 0 and len(warm.json["shapes"]) == 1
    ratios = {}
    for name, own in (("plain", ()), ("adapted", ("--lora", "detail.safetensors"))):
        done = inside("calibrate", "in.jsonl", *model, *own, "-o", f"{name}.json", "--json")
        assert done.returncode == 0, done.stderr
        ratios[name] = done.json["ratios"]
    assert ratios["plain"] != ratios["adapted"]


def test_one_adapter_under_two_names_is_one_set_and_each_row_says_its_own(
    inside, command, pipeline, folder: Path
) -> None:
    (folder / "copy.safetensors").write_bytes((folder / "style.safetensors").read_bytes())
    rows = [{"id": name, "prompt": "a", "seed": 1, "lora": f"{name}.safetensors"} for name in ("style", "copy")]
    write_rows(folder / "in.jsonl", rows)
    assert inside("batch", "in.jsonl", "-o", "out", "-m", pipeline(DEV), *SMALL).returncode == 0
    made = manifest(folder / "out")
    assert {row["batch"]["index"] for row in made.values()} == {0}
    assert {id: row["lora"][0]["path"] for id, row in made.items()} == {
        "style": "style.safetensors",
        "copy": "copy.safetensors",
    }
    halved = [{**row, "lora": [{"path": row["lora"], "scale": 0.5}]} for row in rows]
    write_rows(folder / "in.jsonl", halved)
    assert inside("batch", "in.jsonl", "-o", "half", "-m", pipeline(DEV), *SMALL).returncode == 0
    compared = command("compare", "out", "half", cwd=folder)
    assert compared.returncode == 0 and "lora" in compared.stdout + compared.stderr
