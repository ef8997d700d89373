"""Inputs as people have them, given to the command: read as they are meant, or refused with what to do."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.cli.conftest import SMALL, files
from tests.conftest import ENVIRONMENT, Result, read_rows, write_rows
from tests.pipelines import SCHNELL

DRY = (*SMALL, "--dry-run", "--json")


def plan_of(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.returncode == code, result.stderr
    plan: dict[str, Any] = result.json
    return plan


def manifest(directory: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_rows(directory / "manifest.jsonl")}


# Read as it is meant


def test_a_utf16_table_with_capitals_semicolons_and_floats_is_drawn_as_it_says(inside, tmp_path: Path) -> None:
    table = (
        "sep=;\r\nID;Prompt;Seed;Width;Height;Steps\r\nx1;Ünïcödé 星;7.0;64;80.0;2\r\nx2;a blue square;-1;64;64;1\r\n"
    )
    (tmp_path / "in.csv").write_bytes(table.encode("utf-16"))
    result = inside("batch", "in.csv", "-o", "out", "-m", "tiny")
    assert result.returncode == 0, result.stderr
    rows = manifest(tmp_path / "out")
    assert rows.keys() == {"x1", "x2"}
    first = rows["x1"]
    assert (first["prompt"], first["seed"], first["width"], first["height"]) == ("Ünïcödé 星", 7, 64, 80)
    assert (first["num_inference_steps"], first["meta"]) == (2, {})
    assert 0 <= rows["x2"]["seed"] < 2**53


def test_a_json_array_is_a_job_and_resumes(inside, tmp_path: Path) -> None:
    rows = [{"id": 0, "prompt": "a red circle", "score": float("nan")}, {"id": 1, "prompt": "a blue square"}]
    (tmp_path / "in.json").write_text(json.dumps(rows, indent=2))
    for made in (2, 0):
        result = inside("batch", "in.json", "-o", "out", *SMALL, "--json")
        assert result.returncode == 0, result.stderr
        assert result.json["images"] == made
    assert manifest(tmp_path / "out")["0"]["meta"] == {"score": None}


def test_columns_are_named_and_openais_requests_are_read(inside, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("category,nr,prompt_en,prompt\nA,000,a red circle,not this\n")
    result = inside("batch", "in.csv", "-o", "out", *SMALL, "--prompt-column", "prompt_en", "--id-column", "nr")
    assert result.returncode == 0, result.stderr
    (row,) = manifest(tmp_path / "out").values()
    assert (row["id"], row["prompt"]) == ("000", "a red circle")
    assert row["meta"] == {"category": "A", "prompt": "not this"}
    body = {"model": "flux", "prompt": "a blue square", "n": 2, "size": "64x80", "seed": 2**64 - 2}
    write_rows(tmp_path / "in.jsonl", [{"custom_id": "r", "method": "POST", "body": body}])
    result = inside("batch", "in.jsonl", "-o", "requests", *SMALL)
    assert result.returncode == 0, result.stderr
    assert [(row["id"], row["seed"], row["height"]) for row in manifest(tmp_path / "requests").values()] == [
        ("r-0", 2**64 - 2, 80),
        ("r-1", 2**64 - 1, 80),
    ]


def test_warmup_reads_what_batch_reads(inside, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("Text\tsize\na red circle\t64x80\n")
    result = inside("warmup", "rows", "-m", "tiny", "--input-format", "tsv", "--prompt-column", "text", "--json")
    assert result.returncode == 0, result.stderr
    assert [(shape["width"], shape["height"]) for shape in result.json["shapes"]] == [(64, 80)]


@pytest.mark.parametrize("how", ["-", "/dev/stdin", "fifo"])
def test_streams_are_read_in_the_format_that_is_said(command, tmp_path: Path, how: str) -> None:
    data = b"prompt,id\r\na red circle,x\r\na blue square,y\r\n"
    if how == "fifo":
        os.mkfifo(tmp_path / "rows")
        threading.Thread(target=lambda: (tmp_path / "rows").write_bytes(data), daemon=True).start()
    arguments = ("batch", "rows" if how == "fifo" else how, "--input-format", "csv", *DRY)
    if how != "fifo":
        assert command(*arguments, cwd=tmp_path, stdin=data).returncode == 2, "it has no name to call a job by"
        arguments = (*arguments, "-o", "out")
    plan = plan_of(command(*arguments, cwd=tmp_path, stdin=data))
    assert (plan["images"], plan["failed"]) == (2, 0)
    assert plan["directory"] == ("out/rows" if how == "fifo" else "out")


def test_packed_streams_are_refused_with_what_to_do(command, tmp_path: Path) -> None:
    done = command("batch", "-", "-o", "out", *DRY, cwd=tmp_path, stdin=gzip.compress(b'{"prompt": "a"}'))
    assert done.returncode == 1 and "<stdin>: is gzip" in done.stderr and "gzip -dc FILE |" in done.stderr


def pack_gzip(path: Path, rows: list[dict]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def pack_parquet(path: Path, rows: list[dict]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(("name", "pack"), [("in.jsonl.gz", pack_gzip), ("in.parquet", pack_parquet)])
def test_a_job_over_a_packed_input_goes_on_grows_and_notices_what_moved(inside, tmp_path: Path, name, pack) -> None:
    rows = [{"text": "a red circle"}, {"text": " "}, {"text": "a blue square"}, {"text": "a green star"}]
    pack(tmp_path / name, rows[:3])
    (tmp_path / "job.toml").write_text('prompt-column = "text"\nlimit = 2\n')
    plan = plan_of(inside("batch", name, "--config", "job.toml", *DRY), code=3)
    assert (plan["directory"], plan["rows"], plan["images"]) == ("out/in", 2, 1)
    run = ("batch", name, "-o", "out", *SMALL, "--prompt-column", "text")
    assert inside(*run, "--limit", 1).returncode == 0
    assert inside(*run).returncode == 3
    (failure,) = read_rows(tmp_path / "out" / "failures.jsonl")
    assert (failure["line"], failure["error"]["message"]) == (2, "text is empty"), "by the key that the row has"
    assert list(manifest(tmp_path / "out")) == ["000000", "000002"]
    pack(tmp_path / name, rows)
    before = manifest(tmp_path / "out")
    again = inside(*run, "--json")
    assert (again.returncode, again.json["images"], again.json["done_before"]) == (3, 1, 2)
    assert {id: row for id, row in manifest(tmp_path / "out").items() if id in before} == before
    pack(tmp_path / name, [{"text": "new"}, *rows])
    moved = inside(*run)
    assert moved.returncode == 1 and f"{name}: rows without ids have moved: line 2" in moved.stderr


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_what_a_shell_substitutes_is_read_as_jsonl(tmp_path: Path) -> None:
    line = f'{sys.executable} -m fluxcli batch <(echo \'{{"prompt": "a"}}\') -o out {" ".join(map(str, DRY))}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, cwd=tmp_path, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["images"], told["directory"]) == (1, "out")


# Refused with what to do


REFUSED: dict[str, tuple[str, bytes, tuple[str, ...], tuple[str, ...]]] = {
    "UTF-16 without a mark": ("in.txt", "a red circle\na star\n".encode("utf-16-le"), (), ("byte 1 is 0x00", "iconv")),
    "gzip cut short": ("in.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\3", (), ("gzip", "cut short")),
    "zstd cut short": ("in.csv.zst", b"\x28\xb5\x2f\xfd\0", (), ("zstd", "cut short")),
    "a workbook as CSV": ("in.csv", b"PK\x03\x04\x14\0\6\0", (), ("Excel", "CSV UTF-8")),
    "parquet cut short": ("in.parquet", b"PAR1\x15\x04", (), ("cannot be read as parquet",)),
    "an array that breaks off": ("in.json", b'[{"prompt": "a"},\n{"prompt": "b"', (), ("line 2",)),
    "a named column that is not there": ("in.csv", b"prompt,x\na,b\n", ("--prompt-column", "text"), ("text", "prompt")),
    "columns of a text file": ("in.txt", b"a\n", ("--id-column", "id"), ("in.txt", "no columns")),
    "a header with codes": ("in.csv", b"\x1b[31mx,\x1b[31mx,prompt\n", (), (r"\u001b[31mx twice",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_once_and_nothing_made(inside, tmp_path: Path, case: str) -> None:
    name, data, options, says = REFUSED[case]
    (tmp_path / name).write_bytes(data)
    result = inside("batch", name, "-o", "out", *SMALL, *options)
    assert result.returncode == 1, result.stderr
    (error,) = result.stderr.splitlines()
    assert name in error
    for part in says:
        assert part in error
    assert error.isprintable()
    assert not list((tmp_path / "out").rglob("*.png"))


def test_codes_in_rows_and_names_reach_no_terminal(inside, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "seed": "\x9b2J\u202e"},
        {"prompt": "\x9b31m\x1b[31m", "\u009bkey\u202e": 1, "cfg\u202e": 2, "cfg_scale": 3},
        {"\u009b31m": 1},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "in.jsonl").write_text(text)
    for options in ((), ("--dry-run",), ("--dry-run", "--json"), ("--strict",)):
        result = inside("batch", "in.jsonl", "-o", "out", *SMALL, *options)
        assert (result.stderr + result.stdout).replace("\n", "").isprintable(), options
    for name in ("failures.jsonl", "manifest.jsonl"):
        assert (tmp_path / "out" / name).read_text().replace("\n", "").isprintable()
    assert manifest(tmp_path / "out")["000001"]["prompt"] == "\x9b31m\x1b[31m"


# Told


def test_a_remark_tells_once_what_is_asked_for_and_not_done(inside, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "cfg_scale": 7, "sampler": "x", "tag": 1}, {"prompt": "b", "cfg_scale": 7}]
    write_rows(tmp_path / "in.jsonl", rows)
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL)
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    (remark,) = [line for line in lines if "cfg_scale" in line]
    assert remark.endswith("not do: cfg_scale (2 rows), sampler (1 row)")
    assert lines.index(remark) < next(number for number, line in enumerate(lines) if line.startswith("loading"))
    assert manifest(tmp_path / "out")["000000"]["meta"] == {"cfg_scale": 7, "sampler": "x", "tag": 1}
    before = files(tmp_path)
    strict = inside("batch", "in.jsonl", "-o", "other", *SMALL, "--strict")
    assert strict.returncode == 1
    assert "cfg_scale (2 rows)" in strict.stderr
    assert files(tmp_path) == before


def test_options_in_the_lines_of_a_text_file_are_told_once(inside, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text('--prompt "a red circle" --seed 350 --steps 2\na star --width 64 --height 64\nb\n')
    result = inside("batch", "in.txt", "-o", "out", *SMALL, "--dry-run")
    assert result.returncode == 0
    assert result.stderr.count("options like --seed in the text (2 rows)") == 1


def test_guidance_is_told_where_the_model_takes_none(inside, pipeline, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a", "guidance": 4}, {"prompt": "b"}])
    arguments = ("batch", "in.jsonl", "-m", pipeline(SCHNELL), "--dry-run")
    result = inside(*arguments, "--guidance", 5)
    assert result.returncode == 0
    assert "--guidance changes nothing" in result.stderr
    assert "guidance (this model takes none) (1 row)" in result.stderr
    assert inside(*arguments, "--guidance", 5, "--strict").returncode == 2
    assert inside(*arguments, "--strict").returncode == 1


def test_a_dry_run_names_every_unknown_key_and_exits_3_where_rows_are_bad(inside, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a", "tag": 1}, {"prompt": "b", "tag": 2, "url": 3}])
    assert plan_of(inside("batch", "in.jsonl", *DRY))["unknown_keys"] == {"tag": 2, "url": 1}
    told = inside("batch", "in.jsonl", *DRY[:-1]).stderr
    assert "kept under meta: tag (2 rows), url (1 row)" in told
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"caption": "b"}])
    plan = plan_of(inside("batch", "in.jsonl", *DRY), code=3)
    assert "the row has caption" in plan["failures"][0]["error"]["message"]


def test_cut_prompts_are_counted_at_the_end(inside, tmp_path: Path) -> None:
    long = "a red circle beside a blue square " * 100
    write_rows(tmp_path / "in.jsonl", [{"prompt": long, "n": 2}, {"prompt": "a"}])
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--json")
    assert result.json["truncated"] == 2
    assert ", 2 with a truncated prompt" in result.stderr
    again = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--json")
    assert again.json["truncated"] == 0
    assert "truncated" not in again.stderr


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ('{"prompt": "a"}\n', ("--limit", 0), "nothing to do: --limit 0 takes no rows"),
        ("", (), "nothing to do: the input has no rows"),
        ("\n \n", ("--limit", 3), "nothing to do: the input has no rows"),
    ],
)
def test_a_job_without_rows_says_why(inside, tmp_path: Path, data: str, options: tuple[Any, ...], says: str) -> None:
    (tmp_path / "in.jsonl").write_text(data)
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL, *options)
    assert (result.returncode, result.stderr) == (0, f"{says}\n")


# Again


def test_rows_without_ids_that_moved_stop_the_job_and_ids_are_the_way_out(inside, tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in ("a red circle", "a blue square", "a green star")]
    write_rows(tmp_path / "in.jsonl", rows)
    assert inside("batch", "in.jsonl", "-o", "out", *SMALL).returncode == 0
    before = files(tmp_path / "out")
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a yellow star"}, *rows])
    del before["runs.jsonl"]  # which says that there was a start
    for options in ((), ("--dry-run",)):
        result = inside("batch", "in.jsonl", "-o", "out", *SMALL, *options)
        assert result.returncode == 1
        error, remedy = result.stderr.splitlines()
        assert "in.jsonl: rows without ids have moved: line 2 was made as 000000 and would be 000001 now" in error
        assert "-o" in remedy
    assert {name: data for name, data in files(tmp_path / "out").items() if name in before} == before
    assert not (tmp_path / "out" / "failures.jsonl").exists()
    write_rows(tmp_path / "in.jsonl", [*rows, {"prompt": "a yellow star"}])
    result = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--json")
    assert (result.returncode, result.json["images"], result.json["done_before"]) == (0, 1, 3)


def test_a_strict_job_reads_its_input_once(inside: Callable[..., Result], tmp_path: Path, monkeypatch) -> None:
    from fluxcli.job.input.read import PromptFile

    scans = []
    scan = PromptFile.scan
    monkeypatch.setattr(PromptFile, "scan", lambda self: scans.append(self) or scan(self))
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    for made in (1, 0):
        result = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--strict", "--json")
        assert (result.returncode, result.json["images"], len(scans)) == (0, made, 1)
        scans.clear()
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": ""}])
    assert inside("batch", "in.jsonl", "-o", "out", *SMALL, "--strict").returncode == 1
    assert len(scans) == 1


def test_ids_that_differ_by_case_are_made_where_names_may(inside, tmp_path: Path, monkeypatch) -> None:
    write_rows(tmp_path / "in.jsonl", [{"id": "A", "prompt": "x"}, {"id": "a", "prompt": "y"}])
    assert plan_of(inside("batch", "in.jsonl", *DRY))["images"] == 2
    monkeypatch.setattr("fluxcli.job.job.folds_case", lambda directory: True)
    plan = plan_of(inside("batch", "in.jsonl", *DRY), code=3)
    assert plan["images"] == 1
    assert "id a and the earlier A" in plan["failures"][0]["error"]["message"]
