"""Parquet: its rows are rows like any others, by their number; what cannot be read costs a line, and no memory."""

import datetime
import decimal
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from fluxcli.core.errors import InputError
from fluxcli.job.input.keys import Columns
from fluxcli.job.input.raw import parquet_rows
from fluxcli.job.input.read import PromptFile
from tests.job.input.conftest import images, one, take
from tests.job.input.test_formats import scanned


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pa.table(columns), path, **options)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.parquet"


def test_rows_are_read_with_their_settings_and_the_rest_as_meta(path: Path) -> None:
    columns = {"id": ["x", "y"], "Prompt": ["a", "星"], "seed": [7, None], "width": [64, 128], "tags": [["t"], None]}
    first, second = images(take(write(path, columns)))
    assert (first.id, first.prompt, first.seed, first.width, first.meta) == ("x", "a", 7, 64, {"tags": ["t"]})
    assert (second.id, second.prompt, second.width, second.meta) == ("y", "星", 128, {"tags": None})


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_every_row_reads_again_by_its_offset_whatever_the_groups(path: Path, compression: str) -> None:
    prompts = [f"{n} {random.Random(n).random()}" for n in range(5000)]
    write(path, {"prompt": prompts}, row_group_size=700, compression=compression)
    assert scanned(path) == [(n + 1, {"prompt": each}) for n, each in enumerate(prompts)]


def test_bad_rows_are_told_by_their_number(path: Path) -> None:
    intake = take(write(path, {"prompt": ["a", None, "", "d"], "steps": [1, 1, 1, 5000]}))
    assert [(failure.line, failure.id) for failure in intake.failures] == [
        (2, "000001"), (3, "000002"), (4, "000003"),
    ]  # fmt: skip
    assert [record.line for record in images(intake)] == [1]


def test_another_column_is_the_prompt_where_it_is_named(path: Path) -> None:
    write(path, {"text": ["a"], "nr": [5], "prompt": ["no"]})
    record = one((images(intake := take(path, columns=Columns("text", "nr"))), intake.failures))
    assert (record.id, record.prompt, record.meta) == ("5", "a", {"prompt": "no"})


def test_without_a_column_of_prompts_it_is_refused_with_what_there_is(path: Path) -> None:
    write(path, {"text": ["a"], "nr\x1b[31m": [5]})
    with pytest.raises(InputError, match=r"in\.parquet: .* named prompt .*got text, nr.*--prompt-column") as refused:
        PromptFile(str(path))
    assert str(refused.value).isprintable()


def test_values_of_any_type_are_kept_or_left_out_and_cost_nothing(path: Path) -> None:
    columns = {
        "prompt": pa.array(["a"]).dictionary_encode(),
        "image": pa.array([{"bytes": b"\x89PNG", "path": "x.png"}]),
        "blob": [b"\0\xff"],
        "when": [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)],
        "price": [decimal.Decimal("1.50")],
        "score": [float("nan")],
        "nested": [{"a": [1, {"b": "c"}]}],
        "flag": [True],
    }
    columns["nested"] = pa.array([{"a": [1, 2], "b": {"c": "d"}}])
    record = one((images(intake := take(write(path, columns))), intake.failures))
    assert record.meta == {
        "when": "2026-01-01 00:00:00+00:00",
        "price": "1.50",
        "score": None,
        "nested": {"a": [1, 2], "b": {"c": "d"}},
        "flag": True,
    }


def test_text_that_is_no_utf8_costs_its_own_row(path: Path) -> None:
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xff", b"b"]).buffers())
    intake = take(write(path, {"prompt": text}))
    assert [record.prompt for record in images(intake)] == ["b"]
    assert [(failure.line, "UTF-8" in failure.message) for failure in intake.failures] == [(1, True)]


def test_no_rows_are_no_rows(path: Path) -> None:
    assert scanned(write(path, {"prompt": pa.array([], pa.string())})) == []


def damaged(data: bytes) -> dict[str, bytes]:
    page = bytearray(data)
    page[60:90] = bytes(30)
    return {
        "cut short": data[: len(data) // 2],
        "its end gone": data[:-1],
        "nothing": b"",
        "no parquet": b'{"prompt": "a"}\n',
        "its pages": bytes(page),
        "its footer": data[:-200] + b"\xff" * 192 + data[-8:],
        "its footer's size": data[:-8] + b"\xff\xff\xff\x7f" + data[-4:],
    }


@pytest.mark.parametrize("how", damaged(bytes(300)))
def test_what_is_damaged_is_refused_in_one_line(path: Path, how: str) -> None:
    write(path, {"prompt": [f"prompt {n}" for n in range(100)]}, write_page_checksum=True)
    path.write_bytes(damaged(path.read_bytes())[how])
    with pytest.raises(InputError, match=r"in\.parquet: cannot be read as parquet: ") as refused:
        PromptFile(str(path))
    assert str(refused.value).isprintable() and "Traceback" not in str(refused.value)


def test_two_columns_of_one_name_are_refused(path: Path) -> None:
    parquet.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    with pytest.raises(InputError, match="two columns are named 'prompt'"):
        PromptFile(str(path))


def test_columns_without_end_are_refused(path: Path) -> None:
    write(path, {"prompt": ["a"], **{f"{'x' * 1000}{n}": [n] for n in range(300)}})
    with pytest.raises(InputError, match="the names of its columns take more than 256 KiB"):
        PromptFile(str(path))


def test_without_pyarrow_it_is_refused_with_what_to_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, {"prompt": ["a"]})
    monkeypatch.setattr("fluxcli.job.input.raw.parquet.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"in\.parquet: is parquet, .*fluxcli\[parquet\].*\.jsonl or \.csv"):
        PromptFile(str(path))


def test_the_program_ends_with_its_reader(path: Path) -> None:
    """As where the job is stopped: nobody reads what it writes any more."""
    write(path, {"prompt": ["x" * 1000] * 20_000})
    with path.open("rb") as file:
        program = subprocess.Popen([sys.executable, "-P", parquet_rows.__file__], stdin=file, stdout=subprocess.PIPE)
        assert program.stdout is not None
        assert program.stdout.readline() == b'["prompt"]\n'
        program.stdout.close()
        assert program.wait(60) < 0, "by SIGPIPE"


@pytest.mark.slow
def test_a_file_that_unpacks_to_more_than_any_memory_is_refused(path: Path) -> None:
    """A text of 16 MiB that a thousand rows share: 16 GiB once each has its own."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["a" * 2**24])
    write(path, {"prompt": text}, compression="zstd")
    assert path.stat().st_size < 2**20
    with pytest.raises(InputError, match="cannot be read as parquet: its rows want more than 4 GiB of memory"):
        PromptFile(str(path))
