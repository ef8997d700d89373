"""`fluxcli batch`, as a user meets it: rows in; pictures, manifest, failures, job and runs out; and again."""

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import SMALL, copy_of, files
from tests.conftest import ENVIRONMENT, Result, read_rows, write_rows
from tests.pipelines import DEV, SCHNELL

LONG = "a red circle beside a blue square " * 200
INPUT = [
    {"prompt": "a red circle", "tag": "x", "nested": {"a": [1, None, "星"]}},
    {"id": "own", "prompt": "Ünïcödé 星 🐱", "seed": 5, "width": 96, "height": 80, "steps": 2, "guidance": 2, "n": 2},
    "",
    {"prompt": "bad", "width": 100},
    "not json",
    {"custom_id": "c.3", "prompt": LONG, "guidance_scale": 1.5},
    {"id": "own-1", "prompt": "a second row under a used id"},
    {"prompt": "bad too", "negative_prompt": "ugly"},
    {"id": "last", "prompt": "a blue square"},
]
ROWS = 8  # of a job that is stopped on the way
MADE = {"000000": 1, "own-0": 2, "own-1": 2, "c.3": 6, "last": 9}  # id -> line
ROW_KEYS = [
    "id", "prompt", "file_name", "sha256", "seed", "width", "height", "num_inference_steps", "guidance_scale",
    "text_tokens", "text_length", "truncated", "batch", "timing", "run", "finished_at", "meta",
]  # fmt: skip


class Job(NamedTuple):
    """A job that ran once: where it was started, its directory, and what the command said."""

    home: Path
    directory: Path
    result: Result

    @property
    def manifest(self) -> dict[str, dict[str, Any]]:
        rows = read_rows(self.directory / "manifest.jsonl")
        assert 0 < len(rows) == len({row["id"] for row in rows})
        return {row["id"]: row for row in rows}


def write_input(path: Path) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in INPUT]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def mixed(command, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Good rows and bad ones."""
    home = tmp_path_factory.mktemp("mixed")
    write_input(home / "in.jsonl")
    return Job(home, home / "out", command("batch", "in.jsonl", "-o", "out", *SMALL, "--batch-size", 2, cwd=home))


@pytest.fixture(scope="module")
def clean(command, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Three good rows, with --json, the model from the environment and the default output directory."""
    home = tmp_path_factory.mktemp("clean")
    write_rows(home / "prompts.jsonl", [{"prompt": prompt} for prompt in ("one", "two", "three")])
    arguments = ("batch", "prompts.jsonl", *SMALL[2:], "--json")
    return Job(home, home / "out" / "prompts", command(*arguments, cwd=home, env={"FLUXCLI_MODEL": "tiny"}))


def check_consistent(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Every row has its picture, and every picture its row."""
    names = {row["file_name"] for row in rows}
    assert len(names) == len(rows) == len({row["id"] for row in rows})
    assert {name for name in files(directory) if name.startswith("images/")} == names
    for row in rows:
        assert hashlib.sha256((directory / row["file_name"]).read_bytes()).hexdigest() == row["sha256"]


# What a run leaves


def test_exit_code_is_3_where_some_rows_failed_and_0_where_none_did(mixed: Job, clean: Job) -> None:
    assert mixed.result.returncode == 3, mixed.result.stderr
    assert clean.result.returncode == 0, clean.result.stderr


def test_every_good_row_has_its_image_whatever_the_bad_ones_are(mixed: Job, clean: Job) -> None:
    assert mixed.manifest.keys() == MADE.keys()
    assert clean.manifest.keys() == {"000000", "000001", "000002"}
    check_consistent(mixed.directory, list(mixed.manifest.values()))


def test_the_directory_holds_what_the_contract_lists_and_nothing_else(mixed: Job, clean: Job) -> None:
    expected = {"images", "manifest.jsonl", "job.json", "runs.jsonl"}
    assert set(os.listdir(mixed.directory)) == expected | {"failures.jsonl"}
    assert set(os.listdir(clean.directory)) == expected


def test_a_manifest_row_has_exactly_the_contracts_keys_in_order(mixed: Job) -> None:
    for row in mixed.manifest.values():
        assert list(row) == ROW_KEYS
        assert list(row["batch"]) == ["index", "size", "slot"]
        assert list(row["timing"]) == ["encode_s", "denoise_s", "decode_s", "save_s", "total_s"]


def test_a_manifest_row_tells_the_settings_its_image_was_made_with(mixed: Job) -> None:
    row = mixed.manifest["own-1"]
    assert row["prompt"] == INPUT[1]["prompt"]
    assert (row["seed"], row["width"], row["height"]) == (6, 96, 80)
    assert (row["num_inference_steps"], row["guidance_scale"]) == (2, 2.0)
    assert (row["run"], row["truncated"], row["text_length"]) == (0, False, 64)
    assert row["file_name"] == "images/own-1.png"
    default = mixed.manifest["000000"]
    assert (default["width"], default["height"]) == (64, 64)
    assert (default["num_inference_steps"], default["guidance_scale"]) == (1, 3.5)


def test_pictures_are_pngs_of_their_size_with_the_settings_inside(mixed: Job) -> None:
    for row in mixed.manifest.values():
        with Image.open(mixed.directory / row["file_name"]) as image:
            assert (image.format, image.size) == ("PNG", (row["width"], row["height"]))
            text = image.info["parameters"]
        assert text.startswith(row["prompt"] + "\n")
        for part in (f"Seed: {row['seed']}", f"Steps: {row['num_inference_steps']}", f"{row['width']}x{row['height']}"):
            assert part in text


def test_unknown_keys_come_back_under_meta(mixed: Job) -> None:
    assert mixed.manifest["000000"]["meta"] == {"tag": "x", "nested": {"a": [1, None, "星"]}}
    assert mixed.manifest["own-0"]["meta"] == mixed.manifest["c.3"]["meta"] == {}


def test_a_prompt_beyond_the_largest_bucket_is_cut_there_and_its_row_says_so(mixed: Job) -> None:
    row = mixed.manifest["c.3"]
    assert row["truncated"] is True
    assert row["text_length"] == 512
    assert row["text_tokens"] > 512
    assert row["prompt"] == LONG
    for id in MADE.keys() - {"c.3"}:
        assert mixed.manifest[id]["text_tokens"] <= mixed.manifest[id]["text_length"]


def test_times_are_positive_and_their_total_is_their_sum(mixed: Job) -> None:
    for row in mixed.manifest.values():
        *stages, total = row["timing"].values()
        assert all(seconds > 0 for seconds in stages)
        assert total == pytest.approx(sum(stages), abs=1e-9)


def test_images_of_a_batch_share_its_device_times(mixed: Job) -> None:
    one, other = (mixed.manifest[id]["timing"] for id in ("own-0", "own-1"))
    assert all(one[stage] == other[stage] for stage in ("encode_s", "denoise_s", "decode_s"))


def test_batch_positions_are_those_of_real_batches(mixed: Job) -> None:
    places = [tuple(row["batch"].values()) for row in mixed.manifest.values()]
    assert len(set(places)) == len(places)
    members = Counter(index for index, _, _ in places)
    assert sorted(members) == list(range(len(members)))
    for index, size, slot in places:
        assert size == members[index] <= 2
        assert 0 <= slot < size
    assert mixed.manifest["own-0"]["batch"]["index"] == mixed.manifest["own-1"]["batch"]["index"]


def test_the_manifest_is_in_commit_order(mixed: Job) -> None:
    rows = list(mixed.manifest.values())
    assert [row["batch"]["index"] for row in rows] == sorted(row["batch"]["index"] for row in rows)


def test_finished_at_is_utc_to_the_millisecond(mixed: Job) -> None:
    for row in mixed.manifest.values():
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["finished_at"])
        assert abs(datetime.fromisoformat(row["finished_at"]).timestamp() - time.time()) < 3600


def test_failures_tell_line_id_type_and_message(mixed: Job) -> None:
    rows = read_rows(mixed.directory / "failures.jsonl")
    assert rows[0] == {
        "id": "000002",
        "line": 4,
        "error": {"type": "invalid_row", "message": "width must be a multiple of 16, got 100"},
        "attempt": 1,
        "run": 0,
        "row": {"id": "000002", "prompt": "bad", "width": 100},
    }
    assert [row["line"] for row in rows] == [4, 5, 7, 8]
    keys = ["id", "line", "error", "attempt", "run", "row"]
    assert [list(row) for row in rows] == [keys, keys[:-1], keys, keys], "a line that is no row has none"
    assert rows[2]["row"] == INPUT[6]
    assert rows[1]["id"] is None
    assert "JSON" in rows[1]["error"]["message"]
    assert "own-1" in rows[2]["error"]["message"]
    assert "negative_prompt" in rows[3]["error"]["message"]


def test_bad_rows_and_the_failures_file_are_named_on_stderr(mixed: Job) -> None:
    assert "line 4: width must be a multiple of 16, got 100" in mixed.result.stderr
    assert str(Path("out", "failures.jsonl")) in mixed.result.stderr


def test_the_closing_summary_counts_images_failures_rate_and_stages(mixed: Job) -> None:
    summary = mixed.result.stderr
    for part in (r"\b5 images\b", r"\b4 failed\b", r"images/s", "encode", "denoise", "decode", "save"):
        assert re.search(part, summary), part


def test_stdout_carries_results_only(mixed: Job, clean: Job) -> None:
    assert mixed.result.stdout == ""
    assert clean.result.stdout.count("\n") == 1
    told = clean.result.json
    assert (told["images"], told["failures"], told["exit_status"]) == (3, 0, 0)
    assert Path(told["directory"]) == Path("out", "prompts")


def test_job_json_says_what_the_job_is(mixed: Job) -> None:
    job = json.loads((mixed.directory / "job.json").read_text())
    assert job["model"]["name"] == "tiny"
    assert job["fingerprint"]
    options = job["options"]
    assert (options["width"], options["height"], options["steps"], options["seed"]) == (64, 64, 1, 0)
    assert (options["dtype"], options["text_lengths"], options["format"]) == ("float32", [64, 128, 256, 512], "png")


def test_runs_jsonl_has_a_row_for_the_start(mixed: Job) -> None:
    (row,) = read_rows(mixed.directory / "runs.jsonl")
    assert (row["run"], row["images"], row["failures"], row["exit_status"]) == (0, 5, 4, 3)
    assert row["device"] == "cpu"
    assert row["host"]
    assert row["versions"].keys() >= {"fluxcli", "torch", "diffusers", "transformers", "python"}
    started, finished = (datetime.fromisoformat(row[key]) for key in ("started_at", "finished_at"))
    assert started < finished
    assert 0 < row["seconds"] <= (finished - started).total_seconds() + 0.01
    assert row["images_per_s"] == pytest.approx(5 / row["seconds"], rel=0.02)


def test_seeds_follow_from_ids_so_that_two_jobs_agree(mixed: Job, clean: Job) -> None:
    assert mixed.manifest["000000"]["seed"] == clean.manifest["000000"]["seed"]


# Again


def test_the_same_command_again_does_nothing_and_changes_nothing(inside, clean: Job, tmp_path: Path) -> None:
    home = copy_of(clean.home, tmp_path)
    before = files(home)
    times = {path: path.stat().st_mtime_ns for path in (home / "out" / "prompts" / "images").iterdir()}
    result = inside("batch", "prompts.jsonl", *SMALL, cwd=home)
    assert result.returncode == 0, result.stderr
    after = files(home)
    runs = "out/prompts/runs.jsonl"
    assert after.pop(runs).startswith(before.pop(runs))
    assert after == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [row["exit_status"] for row in read_rows(home / runs)] == [0, 0]
    assert "3" in result.stderr


def test_the_input_may_grow_and_a_lost_picture_is_redone(inside, clean: Job, tmp_path: Path) -> None:
    home = copy_of(clean.home, tmp_path)
    directory = home / "out" / "prompts"
    with (home / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "four"}\n')
    (directory / "images" / "000001.png").unlink()
    result = inside("batch", "prompts.jsonl", *SMALL, cwd=home)
    assert result.returncode == 0, result.stderr
    assert "000001" in result.stderr, "what is redone is said"
    rows = {row["id"]: row for row in read_rows(directory / "manifest.jsonl")}
    assert {id: row["run"] for id, row in rows.items()} == {"000000": 0, "000001": 1, "000002": 0, "000003": 1}
    assert len(read_rows(directory / "manifest.jsonl")) == 4
    check_consistent(directory, list(rows.values()))
    assert rows["000001"]["seed"] == clean.manifest["000001"]["seed"]
    before, after = (
        np.asarray(Image.open(each / "images" / "000001.png")).astype(int) for each in (clean.directory, directory)
    )
    assert np.abs(before - after).max() <= 1, "the same image, though it was made in another batch"


def test_a_rerun_retries_failed_rows_and_makes_those_put_right(inside, mixed: Job, tmp_path: Path) -> None:
    home = copy_of(mixed.home, tmp_path)
    text = (home / "in.jsonl").read_text(encoding="utf-8").replace('"width": 100', '"width": 96')
    (home / "in.jsonl").write_text(text, encoding="utf-8")
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL, cwd=home)
    assert result.returncode == 3
    rows = read_rows(home / "out" / "manifest.jsonl")
    assert [(row["id"], row["run"]) for row in rows[5:]] == [("000002", 1)]
    assert (home / "out" / "manifest.jsonl").read_bytes().startswith((mixed.directory / "manifest.jsonl").read_bytes())
    assert "line 5:" in result.stderr and "3 failed" in result.stderr
    before = read_rows(mixed.directory / "failures.jsonl")
    assert read_rows(home / "out" / "failures.jsonl") == before, "rows that are bad as before were not attempted anew"


def test_failures_are_an_input_again(inside, mixed: Job, tmp_path: Path) -> None:
    home = copy_of(mixed.home, tmp_path)
    failures = home / "out" / "failures.jsonl"
    mended = failures.read_text(encoding="utf-8").replace('"width": 100}', '"width": 96}').replace('"ugly"', '""')
    (home / "mended.jsonl").write_text(mended, encoding="utf-8")
    result = inside("batch", "mended.jsonl", "-o", "out", *SMALL, cwd=home)
    assert result.returncode == 3, result.stderr
    assert "line 2: a failure that carries no row" in result.stderr
    rows = read_rows(home / "out" / "manifest.jsonl")
    assert sorted((row["id"], row["width"]) for row in rows[5:]) == [("000002", 96), ("000006", 64)]
    unchanged = inside("batch", "out/failures.jsonl", "-o", "fresh", *SMALL, cwd=home)
    assert unchanged.returncode == 3
    bad = read_rows(home / "fresh" / "failures.jsonl")
    assert [row["row"] for row in bad if "row" in row][:1] == [{"id": "000002", "prompt": "bad", "width": 100}]


def test_no_retry_failed_leaves_failed_rows_alone(inside, mixed: Job, tmp_path: Path) -> None:
    home = copy_of(mixed.home, tmp_path)
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--no-retry-failed", "--json", cwd=home)
    assert result.returncode == 3, "some rows still have no image"
    assert files(home)["out/failures.jsonl"] == files(mixed.home)["out/failures.jsonl"]
    assert (result.json["images"], result.json["skipped"], result.json["done_before"]) == (0, 4, 5)


def test_other_settings_are_refused_with_each_difference(inside, mixed: Job, tmp_path: Path) -> None:
    home = copy_of(mixed.home, tmp_path)
    other = ("--steps", 3, "--seed", 9, "--format", "jpg", "--text-lengths", 512, "--dtype", "bfloat16")
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL[:-2], *other, cwd=home)
    assert result.returncode == 1
    for difference in ("steps was 1, now 3", "seed was 0, now 9", "format was png, now jpg", "now 512", "now bfloat16"):
        assert difference in result.stderr
    assert "width" not in result.stderr
    assert files(home) == files(mixed.home)


def test_force_starts_over_in_a_new_directory_only(inside, clean: Job, tmp_path: Path) -> None:
    home = copy_of(clean.home, tmp_path)
    before = files(home)
    result = inside("batch", "prompts.jsonl", *SMALL, "--seed", 9, "--force", "--json", cwd=home)
    assert result.returncode == 0, result.stderr
    other = home / result.json["directory"]
    assert other != home / "out" / "prompts"
    assert str(Path(result.json["directory"])) in result.stderr
    after = files(home)
    assert {name: after[name] for name in before} == before
    rows = read_rows(other / "manifest.jsonl")
    assert {row["id"] for row in rows} == clean.manifest.keys()
    assert not {row["seed"] for row in rows} & {row["seed"] for row in clean.manifest.values()}


def test_an_id_committed_with_another_prompt_is_a_failed_row(inside, clean: Job, tmp_path: Path) -> None:
    home = copy_of(clean.home, tmp_path)
    write_rows(home / "prompts.jsonl", [{"prompt": "one"}, {"prompt": "changed"}, {"prompt": "three"}])
    result = inside("batch", "prompts.jsonl", *SMALL, cwd=home)
    assert result.returncode == 3
    (row,) = read_rows(home / "out" / "prompts" / "failures.jsonl")
    assert (row["id"], row["line"]) == ("000001", 2)
    assert files(home)["out/prompts/images/000001.png"] == files(clean.home)["out/prompts/images/000001.png"]


def test_two_rows_that_fail_under_one_id_are_each_at_their_first_attempt(inside, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"id": "x", "prompt": "a", "seed": -2}] * 2)
    inside("batch", "in.jsonl", "-o", "out", *SMALL)
    assert [row["attempt"] for row in read_rows(tmp_path / "out" / "failures.jsonl")] == [1, 1]


def test_a_duplicate_row_does_not_cost_the_first_row_its_image(inside, tmp_path: Path) -> None:
    rows = [{"id": "x", "prompt": "first"}, {"id": "x", "prompt": "second"}, {"id": "y", "prompt": "third"}]
    write_rows(tmp_path / "in.jsonl", rows)
    stopped = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--max-failures", 0)
    assert stopped.returncode == 1
    assert not read_rows(tmp_path / "out" / "manifest.jsonl")
    inside("batch", "in.jsonl", "-o", "out", *SMALL, "--no-retry-failed")
    assert {row["id"] for row in read_rows(tmp_path / "out" / "manifest.jsonl")} == {"x", "y"}


# Options


def test_strict_stops_before_any_work(inside, tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl")
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--strict")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) <= 2
    assert "in.jsonl" in result.stderr
    assert "line 4" in result.stderr
    assert "width must be a multiple of 16, got 100" in result.stderr
    assert files(tmp_path).keys() == {"in.jsonl"}


def test_max_failures_stops_the_job_and_says_why(inside, tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl")
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--max-failures", 3)
    assert result.returncode == 1
    assert "--max-failures" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(read_rows(tmp_path / "out" / "failures.jsonl")) == 4
    (run,) = read_rows(tmp_path / "out" / "runs.jsonl")
    assert run["exit_status"] == 1


def test_limit_formats_and_a_table_as_input(inside, tmp_path: Path) -> None:
    table = 'Prompt\tCategory\tseed\nA sign that says "Hi"\tSigns\t5\nsecond\t\t\nthird\t\t\n'
    (tmp_path / "in.tsv").write_text(table)
    options = ("-o", "out", "--limit", 2, "--format", "webp", "--quality", 80, "--text-lengths", 512)
    result = inside("batch", "in.tsv", *SMALL, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = read_rows(tmp_path / "out" / "manifest.jsonl")
    assert [(row["id"], row["file_name"]) for row in rows] == [
        ("000000", "images/000000.webp"),
        ("000001", "images/000001.webp"),
    ]
    assert rows[0]["prompt"] == 'A sign that says "Hi"'
    assert (rows[0]["seed"], rows[0]["meta"]) == (5, {"Category": "Signs"})
    assert [row["text_length"] for row in rows] == [512, 512], "one number fixes the length"
    with Image.open(tmp_path / "out" / rows[0]["file_name"]) as image:
        assert (image.format, image.size) == ("WEBP", (64, 64))


def test_rows_without_a_number_of_their_own_have_as_many_images_as_n_says(inside, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y", "n": 1}])
    result = inside("batch", "in.jsonl", "-o", "out", "-n", 3, *SMALL)
    assert result.returncode == 0, result.stderr
    rows = read_rows(tmp_path / "out" / "manifest.jsonl")
    assert sorted(row["id"] for row in rows) == ["a-0", "a-1", "a-2", "b"]
    assert len({row["seed"] for row in rows}) == 4
    other = inside("batch", "in.jsonl", "-o", "out", *SMALL)
    assert other.returncode == 1 and "--num-images was 3, now 1" in other.stderr


def test_a_run_tells_its_command_line(clean: Job) -> None:
    (run,) = read_rows(clean.directory / "runs.jsonl")
    assert run["argv"][1:3] == ["batch", "prompts.jsonl"]


def test_standard_input_needs_a_directory(inside) -> None:
    result = inside("batch", "-", *SMALL)
    assert result.returncode == 2 and "give -o DIR" in result.stderr


def test_standard_input_is_jsonl_and_jpg_carries_exif(command, tmp_path: Path) -> None:
    stdin = '{"id": "x", "prompt": "Bänke 星"}\n\nbad\n'.encode()
    result = command("batch", "-", "-o", "out", *SMALL, "--format", "jpg", "--json", cwd=tmp_path, stdin=stdin)
    assert result.returncode == 3, result.stderr
    directory = tmp_path / result.json["directory"]
    (row,) = read_rows(directory / "manifest.jsonl")
    assert row["file_name"] == "images/x.jpg"
    with Image.open(directory / row["file_name"]) as image:
        assert image.format == "JPEG"
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[8:].decode("utf-16-be").startswith("Bänke 星\n")
    assert [row["line"] for row in read_rows(directory / "failures.jsonl")] == [3]


def test_rows_nested_to_any_depth_cost_no_other_row_its_image(command, tmp_path: Path) -> None:
    deep = [f'{{"prompt": "a", "x": {"[" * depth}{"]" * depth}}}' for depth in range(930, 1000)]
    (tmp_path / "in.jsonl").write_text("\n".join([*deep, '{"id": "last", "prompt": "b"}']))
    result = command("batch", "in.jsonl", "-o", "out", *SMALL, "--batch-size", 64, cwd=tmp_path)
    assert result.returncode in (0, 3), result.stderr
    made = {row["id"] for row in read_rows(tmp_path / "out" / "manifest.jsonl")}
    assert "last" in made
    assert len(made) + len(read_rows(tmp_path / "out" / "failures.jsonl")) == len(deep) + 1


# --dry-run and --config


def test_dry_run_shows_the_plan_as_a_table_on_stderr_and_makes_nothing(inside, tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl")
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--dry-run", "--batch-size", 2, cwd=tmp_path)
    assert result.returncode == 3, "some rows are bad"
    assert result.stdout == ""
    assert files(tmp_path).keys() == {"in.jsonl"}
    for part in ("96x80", "64x64", "512", "padding", "shapes to compile", "8 rows", "5 images", "1 truncated"):
        assert part in result.stderr
    assert "line 4: width must be a multiple of 16, got 100" in result.stderr


def test_dry_run_as_json_counts_buckets_batches_padding_shapes_and_what_is_done(inside, mixed: Job, tmp_path) -> None:
    home = copy_of(mixed.home, tmp_path)
    with (home / "in.jsonl").open("a") as file:
        file.write('{"id": "new", "prompt": "x", "n": 3}\n{"id": "long", "prompt": "' + LONG + '"}\n')
    before = files(home)
    options = (*SMALL, "--batch-size", 2, "--dry-run", "--json")
    result = inside("batch", "in.jsonl", "-o", "out", *options, cwd=home)
    assert result.returncode == 3, "some rows are bad"
    assert files(home) == before
    plan = result.json
    assert (plan["rows"], plan["images"], plan["done"], plan["failed"], plan["truncated"]) == (10, 4, 5, 4, 1)
    assert [(bucket["text_length"], bucket["images"]) for bucket in plan["buckets"]] == [(64, 3), (512, 1)]
    assert plan["buckets"][1]["padding"] == 0
    assert 0 < plan["text_padding"] < 1
    assert plan["batches"] == 3
    assert [(shape["batch_size"], shape["text_length"]) for shape in plan["shapes"]] == [(1, 512), (2, 64), (1, 64)]
    assert [failure["line"] for failure in plan["failures"]] == [4, 5, 7, 8]


def test_a_config_file_sets_options_and_the_command_line_wins(inside, tmp_path: Path) -> None:
    toml = (
        'model = "tiny"\nwidth = 96\nheight = 80\nsteps = 3\nbatch-size = 2\nlimit = 3\ndry-run = true\njson = true\n'
    )
    (tmp_path / "job.toml").write_text(toml + 'text_lengths = [32, 512]\noutput = "here"\n')
    write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}] * 5)
    result = inside("batch", "--config", "job.toml", "in.jsonl", "--steps", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    plan = result.json
    assert plan["directory"] == "here"
    assert plan["rows"] == 3
    assert plan["groups"] == [
        {"width": 96, "height": 80, "text_length": 32, "num_inference_steps": 2, "images": 3, "batches": 2}
    ]


@pytest.mark.parametrize(
    ("toml", "names"),
    [
        ("stepps = 4", "stepps"),
        ("steps = 0", "steps"),
        ('format = "bmp"', "format"),
        ("steps = ", "job.toml"),
        ("config = 'other.toml'", "config"),
        ("seed = 1.9", "seed"),
        ("# \xff", "job.toml"),
    ],
)
def test_a_wrong_config_file_is_wrong_usage_and_named(inside, tmp_path: Path, toml: str, names: str) -> None:
    (tmp_path / "job.toml").write_bytes(toml.encode("latin-1"))
    write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    result = inside("batch", "in.jsonl", "-m", "tiny", "--dry-run", "--config", "job.toml")
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert names in result.stderr


@pytest.mark.parametrize(("shape", "steps"), [(DEV, 28), (SCHNELL, 4)], ids=["dev", "schnell"])
def test_models_bring_their_own_defaults(inside, pipeline, tmp_path: Path, monkeypatch, shape, steps: int) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    monkeypatch.setenv("FLUXCLI_MODEL", str(pipeline(shape)))
    result = inside("batch", "in.jsonl", "--dry-run", "--json")
    (group,) = result.json["groups"]
    assert (group["width"], group["height"], group["num_inference_steps"]) == (1024, 1024, steps)


def test_without_a_model_and_a_gpu_the_built_in_one_is_used_saying_so_in_one_line(command, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    result = command("batch", "in.jsonl", "--dry-run", "--json", cwd=tmp_path)
    assert result.returncode == 0
    assert len([line for line in result.stderr.splitlines() if "tiny" in line]) == 1
    (group,) = result.json["groups"]
    assert (group["width"], group["height"]) == (128, 128)


# On a terminal


def test_a_terminal_gets_a_bar_and_no_color_is_honoured(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": f"row {n}"} for n in range(6)] + [{"prompt": ""}])
    mine, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with subprocess.Popen(
        [sys.executable, "-m", "fluxcli", "batch", "in.jsonl", *map(str, SMALL), "--batch-size", "2"],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT, "NO_COLOR": "1", "TERM": "xterm-256color"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(mine, 4096)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.stdout and process.stdout.read() == b""
    os.close(mine)
    assert process.returncode == 3
    assert b"img" in shown
    assert re.search(rb"\b6/[67]\b", shown), shown
    assert re.search(rb"fail\w*=1", shown)
    assert not re.search(rb"\x1b\[[0-9;]*m", shown)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_job_keeps_what_is_committed_and_a_rerun_finishes_it(
    inside: Callable[..., Result], tmp_path: Path, number: signal.Signals
) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": f"row {n}"} for n in range(ROWS)])
    arguments = ["batch", "in.jsonl", "-o", "out", *map(str, SMALL[:-1]), "50", "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxcli", *arguments],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    manifest = tmp_path / "out" / "manifest.jsonl"
    deadline = time.monotonic() + 60
    while not (manifest.exists() and manifest.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline and process.poll() is None, "the job never got going"
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert b"Traceback" not in stderr
    assert b"again" in stderr, "the message says what to do"
    assert stdout == b""
    rows = read_rows(manifest)
    assert 2 <= len(rows) < ROWS
    check_consistent(tmp_path / "out", rows)
    assert read_rows(tmp_path / "out" / "runs.jsonl")[-1]["exit_status"] == 128 + number
    before = manifest.read_bytes()
    result = inside(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert manifest.read_bytes().startswith(before)
    rows = read_rows(manifest)
    assert {row["id"] for row in rows} == {f"{n:06d}" for n in range(ROWS)}
    check_consistent(tmp_path / "out", rows)


def test_an_automatic_batch_size_is_planned_recorded_and_kept(inside, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path / "in.jsonl", [{"prompt": f"{number}"} for number in range(3)])
    options = ("in.jsonl", *SMALL, "--batch-size", "auto", "--json")
    planned = [inside("batch", *options, "--dry-run").json["shapes"] for _ in range(2)]
    assert planned[0] == planned[1]
    assert inside("batch", *options, "-o", "out").returncode == 0
    (shape,) = planned[0]
    (run,) = read_rows(tmp_path / "out" / "runs.jsonl")
    assert run["shapes"] == [f"{shape['batch_size']} x 64x64, text {shape['text_length']}"]
    assert {row["batch"]["size"] for row in read_rows(tmp_path / "out" / "manifest.jsonl")} <= {1, 2, 3}
    (tmp_path / "job.toml").write_text('batch-size = "auto"')
    configured = inside("batch", "in.jsonl", *SMALL, "--config", "job.toml", "--dry-run", "--json")
    assert configured.json["shapes"] == planned[0]


@pytest.mark.parametrize("size", ["0", "1025", "many", "-1", "1.5"])
def test_a_batch_size_that_cannot_be_meant_is_wrong_usage(inside, size: str) -> None:
    result = inside("gen", "a", "-m", "tiny", "--batch-size", size)
    assert result.returncode == 2
    assert "--batch-size" in result.stderr
