"""`fluxcli compare` pairs what two jobs made of the same rows, says how far apart it is, and tells what it left out."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxcli.core.errors import JobError
from fluxcli.core.files import json_line
from fluxcli.core.records import Batch
from fluxcli.job.output import rows
from fluxcli.job.output.lock import Lock
from fluxcli.job.report.compare import PROMPT, Comparison, Pair, compare
from fluxcli.job.report.compare_text import data_of, lines_of
from fluxcli.job.report.distance import psnr, ssim
from tests.conftest import read_rows, write_rows
from tests.job import harness
from tests.job.report.test_verify import _sha256, hand_over, many

CHANGED = {"p2": 40, "p5": 4, "p7": 1}  # ids, and by how many grey levels B's image is off


def changed(batch: Batch, pixels: np.ndarray, finite: list[bool]) -> None:
    for record, image in zip(batch.records, pixels, strict=True):
        step = CHANGED.get(record.id, 0)
        image[:] = np.where(image > 127, image - step, image + step)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jobs `a`; `same`, in other batches; and `b`, of which three images are others."""
    home = tmp_path_factory.mktemp("compare")
    rows = harness.write_input(home / "rows.jsonl")
    assert harness.run(rows, home / "a") == 0
    assert harness.run(rows, home / "same", batch_size=2) == 0
    assert harness.run(rows, home / "b", harness.SeedEngine(changed)) == 0
    return home


@pytest.fixture
def jobs(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """`a` and `b`, to be changed."""
    return shutil.copytree(made / "a", tmp_path / "a"), shutil.copytree(made / "b", tmp_path / "b")


def pixels(directory: Path, id: str) -> np.ndarray:
    with Image.open(directory / "images" / f"{id}.png") as image:
        return np.asarray(image)


def left_out(comparison: Comparison) -> dict[str, tuple[int, list[str]]]:
    return {reason: (told.rows, told.ids) for reason, told in comparison.not_compared.items()}


def change_rows(directory: Path, change: Callable[[dict], dict | None]) -> None:
    rows = [change(row) for row in read_rows(directory / "manifest.jsonl")]
    write_rows(directory / "manifest.jsonl", [row for row in rows if row is not None])


def test_pairs_are_measured_and_those_farthest_apart_come_first(made: Path) -> None:
    seen: list[Pair] = []
    found = compare(made / "a", made / "b", each=seen.append)
    assert [pair.id for pair in found.worst] == list(CHANGED)
    for pair in found.worst:
        a, b = pixels(made / "a", pair.id), pixels(made / "b", pair.id)
        assert (pair.psnr, pair.ssim, pair.lpips) == (psnr(a, b), ssim(a, b), None)
        assert pair.prompt == f"picture {pair.id[1:]}" and pair.file_a == pair.file_b == f"images/{pair.id}.png"
    assert found.compared == harness.ROWS and found.identical == harness.ROWS - len(CHANGED)
    assert [pair.id for pair in seen] == [row["id"] for row in read_rows(made / "a" / "manifest.jsonl")]
    assert {pair.id for pair in seen if pair.psnr != math.inf} == set(CHANGED)
    assert not found.not_compared


def test_identical_images_count_in_ranks_and_not_in_the_mean_of_psnr(made: Path) -> None:
    found = compare(made / "a", made / "b")
    values = sorted(pair.psnr for pair in found.worst)
    data = data_of(found)
    assert data["psnr"]["mean"] == pytest.approx(sum(values) / 3, abs=1e-5)
    assert data["psnr"]["percentiles"]["0"] == pytest.approx(values[0], abs=1e-5)
    assert data["psnr"]["percentiles"]["50"] is None, "of eleven pairs eight are equal"
    assert data["ssim"]["mean"] == pytest.approx((8 + sum(pair.ssim for pair in found.worst)) / 11, abs=1e-5)
    assert "over the 3 pairs that differ" in lines_of(data)


def test_other_batches_of_the_same_job_are_the_floor(made: Path) -> None:
    found = compare(made / "a", made / "same")
    data = data_of(found)
    assert data["identical"] == data["compared"] == harness.ROWS and data["worst"] == []
    assert data["psnr"]["mean"] is None and data["ssim"]["mean"] == 1
    assert data["settings"] == {"batch_size": {"a": "4, 3", "b": "2, 1"}}
    json.dumps(data, allow_nan=False)


def test_the_order_of_the_manifests_changes_nothing(jobs: tuple[Path, Path]) -> None:
    before = data_of(compare(*jobs))
    for directory in jobs:
        rows = read_rows(directory / "manifest.jsonl")
        random.Random(1).shuffle(rows)
        write_rows(directory / "manifest.jsonl", rows)
    assert data_of(compare(*jobs)) == before


@pytest.mark.parametrize(("worst", "ids"), [(0, []), (1, ["p2"]), (2, ["p2", "p5"]), (20, ["p2", "p5", "p7"])])
def test_as_many_of_the_worst_as_are_wanted(made: Path, worst: int, ids: list[str]) -> None:
    assert [pair.id for pair in compare(made / "a", made / "b", worst=worst).worst] == ids


def test_a_perceptual_distance_is_asked_of_images_that_differ_alone(made: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def perceptual(a: np.ndarray, b: np.ndarray) -> float:
        asked.append((a.dtype, a.shape, b.dtype, b.shape))
        return float(np.abs(a.astype(int) - b).max())

    data = data_of(compare(made / "a", made / "b", perceptual))
    assert asked == [(np.uint8, (64, 64, 3), np.uint8, (64, 64, 3))] * 3
    assert [pair["lpips"] for pair in data["worst"]] == list(CHANGED.values())
    assert data["lpips"]["mean"] == pytest.approx(sum(CHANGED.values()) / harness.ROWS, abs=1e-5)
    assert data["lpips"]["percentiles"]["0"] == 0 and data["lpips"]["percentiles"]["100"] == 40
    assert "LPIPS" in lines_of(data)


def test_rows_that_are_not_the_same_are_told_and_not_compared(jobs: tuple[Path, Path]) -> None:
    a, b = jobs
    change_rows(a, lambda row: None if row["id"] in ("p0", "p1") else row)
    others = {"p3": {"seed": 1}, "p4": {"prompt": "another"}, "p6": {"width": 128}, "p8": None}
    change_rows(b, lambda row: None if row["id"] == "p8" else {**row, **others.get(row["id"], {})})
    found = compare(a, b)
    assert left_out(found) == {
        "only_in_a": (1, ["p8"]),
        "only_in_b": (2, ["p0", "p1"]),
        "other_seed": (1, ["p3"]),
        "other_prompt": (1, ["p4"]),
        "other_size": (1, ["p6"]),
    }
    assert found.compared == harness.ROWS - 6
    assert "not compared: 2 rows only in B (p0, p1)" in lines_of(data_of(found))


def test_what_differs_in_the_settings_is_told(made: Path, jobs: tuple[Path, Path]) -> None:
    a, b = jobs
    job = json.loads((b / "job.json").read_text())
    job["model"]["fingerprint"] = "1:ffff"
    job["options"] |= {"dtype": "bfloat16", "quantization": "fp8", "later": True, "text_lengths": [512]}
    (b / "job.json").write_text(json.dumps(job))
    (run,) = read_rows(b / "runs.jsonl")
    write_rows(b / "runs.jsonl", [{**run, "device": "another", "versions": {"torch": "9"}}])
    faster = {"num_inference_steps": 1, "step_cache": "10", "text_length": 512}
    change_rows(b, lambda row: {**row, **faster} if row["id"] < "p3" else row)
    data = data_of(compare(a, b))
    settings = {name: (each["a"], each["b"]) for name, each in data["settings"].items()}
    assert settings.pop("model")[1] == "tiny (weights 1:ffff)"
    assert settings == {
        "dtype": ("float32", "bfloat16"),
        "quantization": ("none", "fp8"),
        "later": (None, "True"),
        "text_lengths": ("64", "512"),
        "device": ("seed", "another"),
        "fluxcli": (read_rows(a / "runs.jsonl")[0]["versions"]["fluxcli"], None),
        "python": (read_rows(a / "runs.jsonl")[0]["versions"]["python"], None),
        "torch": (None, "9"),
    }
    few = sum(row["id"] < "p3" for row in read_rows(a / "manifest.jsonl"))
    assert data["rows_with_other"] == dict.fromkeys(faster, few)
    assert {pair["id"]: set(pair["differs"]) for pair in data["worst"]} == {"p2": {*faster}, "p5": set(), "p7": set()}
    told = lines_of(data)
    assert "  later: A has none; B True" in told and f"  step_cache differs in {few} rows" in told


def bomb(path: Path) -> None:
    """A PNG of a few KiB that says it is larger than any memory."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    whole = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(2**16))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + whole)


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)  # a hole: no bytes on the disk


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def smaller(path: Path) -> None:
    Image.new("RGB", (32, 32)).save(path)


DAMAGE: dict[str, tuple[Callable[[Path], None], bool]] = {  # what is done to a file; whether its row has its hash
    "missing_image": (Path.unlink, False),
    "altered_image": (smaller, False),
    "wrong_size": (smaller, True),
    "undecodable_image": (cut, True),
    "undecodable_image ": (bomb, True),
    "undecodable_image  ": (large, False),
    "undecodable_image   ": (lambda path: path.write_text("no picture") and None, True),
}


@pytest.mark.parametrize("reason", DAMAGE)
@pytest.mark.parametrize("side", [0, 1])
def test_a_damaged_image_is_told_and_not_compared(jobs: tuple[Path, Path], reason: str, side: int) -> None:
    harm, with_hash = DAMAGE[reason]
    path = jobs[side] / "images" / "p5.png"
    harm(path)
    if with_hash:
        sha256 = _sha256(path)
        change_rows(jobs[side], lambda row: {**row, "sha256": sha256} if row["id"] == "p5" else row)
    found = compare(*jobs)
    assert left_out(found) == {f"{reason.strip()}_{'ab'[side]}": (1, ["p5"])}
    assert found.compared == harness.ROWS - 1 and [pair.id for pair in found.worst] == ["p2", "p7"]
    assert lines_of(data_of(found)).isascii()


def test_lines_that_are_no_rows_and_rows_twice_cost_the_others_nothing(jobs: tuple[Path, Path]) -> None:
    for directory in jobs:
        manifest = directory / "manifest.jsonl"
        lines = manifest.read_bytes().splitlines(keepends=True)
        later = json_line({**json.loads(lines[0]), "seed": 5})
        foreign = [b"[1]\n", b"\xff\n", b"[" * 10**5 + b"\n", b'{"id": "p0"}\n', b"\0\0\n"]
        manifest.write_bytes(b"".join([*foreign, *lines, later, b'{"torn']))
    found = compare(*jobs)
    assert left_out(found) == {"repeated": (2, []), "bad_row_a": (5, []), "bad_row_b": (5, [])}
    assert found.compared == harness.ROWS


def test_rows_that_went_through_pandas_are_known(jobs: tuple[Path, Path]) -> None:
    change_rows(jobs[1], lambda row: {**row, "width": 64.0, "timing": None, "finished_at": 1_760_000_000_000})
    assert compare(*jobs).compared == harness.ROWS


def test_a_directory_from_somebody_else_shows_nothing_outside_it(jobs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = jobs
    before = hand_over(b, tmp_path / "home")
    Image.fromarray(pixels(a, "p0")).save(tmp_path / "home" / "p0.png")
    before[tmp_path / "home" / "p0.png"] = (tmp_path / "home" / "p0.png").read_bytes()
    (a / "images" / "p1.png").unlink()
    os.mkfifo(a / "images" / "p1.png")
    found = compare(a, b)
    assert left_out(found) == {"bad_row_b": (4, []), "missing_image_a": (1, ["p1"]), "missing_image_b": (1, ["p0"])}
    assert {path: path.read_bytes() for path in (tmp_path / "home").iterdir()} == before


def test_what_a_stranger_wrote_reaches_no_terminal_and_fills_nothing(jobs: tuple[Path, Path]) -> None:
    a, b = jobs
    evil = "\x1b]0;owned\x07\r\n\u202e"
    change_rows(b, lambda row: {**row, evil: 1, **{f"key{n}": n for n in range(500)}, "batch": {"size": 10**30}})
    run = read_rows(b / "runs.jsonl")[0]
    versions = {evil: evil, "list": [1], "long": "x" * 10**6, **{f"lib{n}": "1" for n in range(500)}}
    write_rows(b / "runs.jsonl", [{**run, "device": f"{evil}{n}", "versions": versions} for n in range(100)])
    data = data_of(compare(a, b))
    told = lines_of(data)
    assert told.replace("\n", "").isprintable() and len(told) < 20_000
    assert len(data["settings"]) < 100 and len(data["rows_with_other"]) < 100
    assert data["compared"] == harness.ROWS


def test_a_pair_holds_the_beginning_of_a_prompt(jobs: tuple[Path, Path]) -> None:
    for directory in jobs:
        change_rows(directory, lambda row: {**row, "prompt": "x" * 10**6})
    assert {pair.prompt for pair in compare(*jobs).worst} == {"x" * PROMPT}


def test_looking_changes_nothing(jobs: tuple[Path, Path]) -> None:
    (jobs[1] / "images" / ".p4.png.tmp").write_bytes(b"half")
    (jobs[1] / ".runs.jsonl.tmp").write_bytes(b"half")

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for job in jobs for path in job.rglob("*") if path.is_file()}

    before = contents()
    compare(*jobs)
    assert contents() == before


def test_a_job_that_runs_or_is_not_done_is_seen_as_it_stands(jobs: tuple[Path, Path]) -> None:
    a, b = jobs
    change_rows(b, lambda row: row if row["id"] in ("p1", "p2") else None)
    run = read_rows(b / "runs.jsonl")[0]
    write_rows(b / "runs.jsonl", [{**run, "images": 2, "exit_status": 130}])
    lock = Lock(b)
    try:
        found = compare(a, b)
    finally:
        lock.release()
    assert found.compared == 2 and found.not_compared["only_in_a"].rows == harness.ROWS - 2
    told = lines_of(data_of(found))
    assert f"2 images, 9 still to make, in use by pid {os.getpid()} on" in told


@pytest.mark.parametrize("name", ["manifest.jsonl", "job.json"])
@pytest.mark.parametrize("odd", ["gone", "pipe", "link", "directory", "empty"])
def test_a_directory_that_holds_no_job_to_compare_is_told_in_a_line(
    jobs: tuple[Path, Path], name: str, odd: str
) -> None:
    path = jobs[1] / name
    path.rename(path.with_name("away"))
    if odd == "pipe":
        os.mkfifo(path)
    elif odd == "link":
        path.symlink_to("away")
    elif odd == "directory":
        path.mkdir()
    elif odd == "empty":
        path.touch()
    with pytest.raises(JobError, match=str(jobs[1])) as error:
        compare(*jobs)
    assert "\n" not in str(error.value)


def test_jobs_that_share_no_row_cannot_be_compared(jobs: tuple[Path, Path]) -> None:
    change_rows(jobs[1], lambda row: {**row, "seed": 1} if row["id"] != "p1" else None)
    with pytest.raises(JobError, match=r"no row can be compared \(only_in_a 1, other_seed 10\)"):
        compare(*jobs)


def test_a_line_without_end_is_refused_before_it_fills_memory(
    jobs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LONGEST_LINE", 2**20)
    manifest = jobs[1] / "manifest.jsonl"
    whole = manifest.read_bytes()
    with manifest.open("wb") as file:
        file.truncate(5 * 2**20)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + whole)
    with pytest.raises(JobError, match=r"manifest\.jsonl, line 1: is longer than 1 MiB"):
        compare(*jobs)


def test_the_command_tells_and_exits(made: Path, fluxcli: Callable[..., Any], tmp_path: Path) -> None:
    found = fluxcli("compare", made / "a", made / "b", "--json", "--worst", 2)
    assert found.returncode == 0 and "Traceback" not in found.stderr
    assert found.json["identical"] == 8 and [pair["id"] for pair in found.json["worst"]] == ["p2", "p5"]
    assert "compared: 11 pairs of images, 8 of them identical" in found.stderr
    part = shutil.copytree(made / "a", tmp_path / "part")
    (part / "images" / "p0.png").unlink()
    told = fluxcli("compare", part, made / "b")
    assert told.returncode == 3 and told.stdout == ""
    assert "not compared: 1 row without an image in A (p0)" in told.stderr


@pytest.mark.slow
def test_a_row_more_costs_compare_some_bytes(tmp_path: Path) -> None:
    assert harness.run(harness.write_input(tmp_path / "rows.jsonl", 1), tmp_path / "job") == 0
    (row,) = read_rows(tmp_path / "job" / "manifest.jsonl")
    code = (
        "import sys; from pathlib import Path; from fluxcli.job.report.compare import compare\n"
        "found = compare(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(found.compared, peak.split()[1])"
    )

    def peak(count: int) -> int:
        """KiB."""
        jobs = [many(tmp_path / f"{side}{count}", row, count) for side in "ab"]
        done = subprocess.run([sys.executable, "-c", code, *jobs], capture_output=True, text=True, check=True)
        compared, kib = done.stdout.split()
        assert int(compared) == count
        return int(kib)

    few, lots = peak(10_000), peak(150_000)
    each = (lots - few) * 1024 / 140_000
    print(f"{few} KiB for 10,000 rows, {lots} for 150,000: {each:.0f} bytes a row")
    assert each < 300
