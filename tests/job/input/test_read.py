"""The input: every key, alias, default, check and format of the contract's row table; a bad row costs only itself."""

import codecs
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fluxcli.core.config import RowDefaults
from fluxcli.core.errors import InputError
from fluxcli.core.records import Failure, PromptRecord
from fluxcli.job.input.check import check_row
from fluxcli.job.input.raw.lines import MAX_LINE
from fluxcli.job.input.read import PromptFile
from tests.job.input.conftest import DEFAULTS, images, one, refusal, take

# Keys, aliases and defaults


def test_a_prompt_alone_gets_every_default(read) -> None:
    record = one(read([{"prompt": "a bench"}]))
    assert (record.id, record.prompt, record.line, record.meta) == ("000000", "a bench", 1, {})
    assert (record.width, record.height, record.num_inference_steps, record.guidance_scale) == (1024, 768, 28, 3.5)
    assert 0 <= record.seed < 2**53, "jq, JavaScript and pandas keep it"


def test_a_row_overrides_every_default(read) -> None:
    row = {"id": "x", "prompt": "a", "seed": 7, "width": 64, "height": 4096, "num_inference_steps": 1}
    record = one(read([{**row, "guidance_scale": -1.5}]))
    assert (record.id, record.seed, record.width, record.height) == ("x", 7, 64, 4096)
    assert (record.num_inference_steps, record.guidance_scale) == (1, -1.5)


@pytest.mark.parametrize(
    ("alias", "value", "field"),
    [("custom_id", "x", "id"), ("steps", 9, "num_inference_steps"), ("guidance", 2, "guidance_scale")],
)
def test_an_alias_means_its_key(read, alias: str, value: Any, field: str) -> None:
    record = one(read([{"prompt": "a", alias: value}]))
    assert getattr(record, field) == value
    assert not record.meta


@pytest.mark.parametrize("alias", ["n", "num_images", "num_images_per_prompt"])
def test_num_images_expands_to_numbered_ids_with_their_own_seeds(read, alias: str) -> None:
    records, failures = read([{"prompt": "a", "id": "x", alias: 3}])
    assert [record.id for record in records] == ["x-0", "x-1", "x-2"]
    assert len({record.seed for record in records}) == 3
    assert not failures
    alone = one(read([{"prompt": "b", "id": "x-1"}]))
    assert alone.seed == records[1].seed, "an expanded image's seed follows from its own id"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"steps": 0}, "steps must be 1 to 1000, got 0"),
        ({"Steps": "x"}, 'Steps must be an integer, got "x"'),
        ({"custom_id": "a b"}, "custom_id must be "),
        ({"n": 0}, "n must be "),
        ({"size": "100x64"}, "size: width must be a multiple of 16, got 100"),
        ({"width": 100}, "width must be a multiple of 16, got 100"),
        ({"guidance": "x"}, "guidance must be a number"),
    ],
)
def test_what_is_wrong_is_told_by_the_key_that_the_row_has(read, row: dict, message: str) -> None:
    assert refusal(read([{"prompt": "a", **row}])).message.startswith(message)


def test_a_failed_image_asks_for_itself_again(read) -> None:
    row = {"prompt": "a", "id": "x", "n": 3, "steps": 9, "tag": {"a": 1}}
    record = read([row])[0][1]
    failure = Failure.of(record, "out_of_memory", "no room").as_row()
    assert failure["row"] == {"id": "x-1", "prompt": "a", "steps": 9, "tag": {"a": 1}, "seed": record.seed}
    again = one(read([{**failure, "attempt": 1, "run": 0}]))
    assert replace(again, line=record.line) == record


def test_an_explicit_seed_counts_up_over_num_images(read) -> None:
    records, _ = read([{"prompt": "a", "seed": 40, "n": 3}])
    assert [(record.id, record.seed) for record in records] == [("000000-0", 40), ("000000-1", 41), ("000000-2", 42)]


def test_one_image_keeps_its_id(read) -> None:
    assert one(read([{"prompt": "a", "id": "x", "n": 1}])).id == "x"


def test_a_key_and_its_alias_together_are_refused(read) -> None:
    assert "num_inference_steps" in refusal(read([{"prompt": "a", "steps": 3, "num_inference_steps": 4}])).message


def test_unknown_keys_are_kept_as_they_are_under_meta(read) -> None:
    extra = {"tag": "x", "nested": {"a": [1, None, "星"]}, "meta": {"b": 1.5}, "Prompt": "no column here", "model": "m"}
    assert one(read([{"prompt": "a", **extra}])).meta == extra


def test_null_means_the_default(read) -> None:
    nothing = dict.fromkeys(["id", "seed", "width", "height", "steps", "guidance", "n"])
    assert one(read([{"prompt": "a", **nothing}])) == one(read([{"prompt": "a"}]))


def test_guidance_is_none_where_the_model_takes_none(read) -> None:
    schnell = RowDefaults(1024, 1024, 4, None)
    assert one(read([{"prompt": "a"}], defaults=schnell)).guidance_scale is None
    assert one(read([{"prompt": "a", "guidance": 5}], defaults=schnell)).guidance_scale is None


# Seeds


def test_derived_seeds_depend_on_the_jobs_seed_and_the_id_alone(read) -> None:
    rows = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y", "width": 64}, {"prompt": "c", "id": "z"}]
    seeds = {record.id: record.seed for record in read(rows)[0]}
    turned = [{**row, "prompt": "other", "height": 64, "steps": 2} for row in reversed(rows)]
    assert {record.id: record.seed for record in read(turned)[0]} == seeds
    assert len(set(seeds.values())) == 3
    other = {record.id: record.seed for record in read(rows, defaults=RowDefaults(1024, 768, 28, 3.5, seed=1))[0]}
    assert not set(other.values()) & set(seeds.values())


def test_an_explicit_seed_is_taken_as_it_is(read) -> None:
    for seed in (0, 2**53, 2**64 - 1):
        assert one(read([{"prompt": "a", "seed": seed}], defaults=RowDefaults(64, 64, 1, None, seed=9))).seed == seed


# Checks


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n\t"}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2.0**53}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": 2**64 - 1, "n": 2}, "seed"),
        ({"width": 100}, "width must be a multiple of 16, got 100"),
        ({"width": 48}, "width"),
        ({"width": 4112}, "width"),
        ({"height": 63}, "height"),
        ({"height": "64"}, "height"),
        ({"height": True}, "height"),
        ({"height": 128.5}, "height"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"num_inference_steps": "4"}, "num_inference_steps"),
        ({"guidance": "3.5"}, "guidance must be"),
        ({"guidance": True}, "guidance must be"),
        ({"guidance": 10**400}, "guidance must be"),
        ({"guidance_scale": [3]}, "guidance_scale"),
        ({"n": 0}, "n must be"),
        ({"num_images": -1}, "num_images"),
        ({"num_images": 2.5}, "num_images"),
        ({"num_images": 10**9}, "num_images"),
        ({"negative_prompt": "ugly"}, "negative_prompt needs true_cfg_scale above 1"),
        ({"negative_prompt": "ugly", "true_cfg_scale": 1}, "negative_prompt needs true_cfg_scale above 1"),
        ({"negative_prompt": 7, "true_cfg_scale": 4}, "negative_prompt must be a string, got 7"),
        ({"negative_prompt": "ugly", "true_cfg_scale": "4"}, "true_cfg_scale must be a number"),
        ({"negative_prompt": "ugly", "true_cfg_scale": True}, "true_cfg_scale must be a number"),
        ({"negative_prompt": "ugly", "true_cfg_scale": 10**400}, "true_cfg_scale must be a finite number"),
        ({"size": "large"}, "size must be text like 1024x768"),
        ({"size": 1024}, "size must be text like 1024x768"),
        ({"size": "100x64"}, "width must be a multiple of 16, got 100"),
        ({"size": "64x64", "width": 64}, "width is given twice"),
    ],
    ids=str,
)
def test_a_value_out_of_its_rule_is_refused_by_name(read, row: dict[str, Any], names: str) -> None:
    failure = refusal(read([{"prompt": "a", **row} if row and "prompt" not in row else row]))
    assert names in failure.message
    assert failure.kind == "invalid_row"
    assert failure.line == 1
    assert "\n" not in failure.message
    assert len(failure.message) < 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize(
    ("key", "name"), [("guidance", "guidance must be"), ("seed", "seed"), ("width", "width"), ("prompt", "prompt")]
)
def test_what_is_no_number_in_json_is_refused_by_name_where_it_is_used(read, key: str, name: str, number: str) -> None:
    row = f'{{"prompt": "a", "{key}": {number}}}\n'
    assert name in refusal(read(row.encode())).message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_what_is_no_number_in_json_is_null_where_it_is_not_used(read, number: str) -> None:
    row = f'{{"prompt": "a", "score": {number}, "more": [1.5, {{"x": {number}}}], "seed": 7}}\n'
    record = one(read(row.encode()))
    assert record.seed == 7
    assert record.meta == {"score": None, "more": [1.5, {"x": None}]}


def test_the_limits_themselves_are_accepted(read) -> None:
    for row in ({"width": 64, "height": 4096}, {"steps": 1}, {"steps": 1000}, {"seed": 2**64 - 1}, {"guidance": 0}):
        one(read([{"prompt": "a", **row}]))


@pytest.mark.parametrize("empty", ["", " ", "\t\n", None, "nan", "NaN"])
def test_an_empty_negative_prompt_is_no_offence(read, empty: str | None) -> None:
    one(read([{"prompt": "a", "negative_prompt": empty}]))


@pytest.mark.parametrize(
    ("row", "true_cfg"),
    [
        ({"negative_prompt": "ugly", "true_cfg_scale": 4}, ("ugly", 4.0)),
        ({"negative_prompt": "", "true_cfg_scale": 1.5}, ("", 1.5)),
        ({"Negative_Prompt": "nan", "true_cfg_scale": 4}, ("", 4.0)),
        ({"true_cfg_scale": 4}, (None, 1.0)),
        ({"negative_prompt": None, "true_cfg_scale": 4}, (None, 1.0)),
        ({"negative_prompt": "", "true_cfg_scale": 1}, (None, 1.0)),
        ({"true_cfg_scale": 0}, (None, 1.0)),
        ({}, (None, 1.0)),
    ],
)
def test_true_cfg_is_on_as_fluxpipeline_has_it(read, row: dict[str, Any], true_cfg: tuple[str | None, float]) -> None:
    record = one(read([{"prompt": "a", **row}]))
    assert (record.negative_prompt, record.true_cfg_scale) == true_cfg
    assert record.branches == record.group.branches == (1 if true_cfg[0] is None else 2)


@pytest.mark.parametrize("id", ["a", "A.b_c-9", "-x", "_", "0", "x" * 128, "a..b"])
def test_a_good_id_is_accepted(read, id: str) -> None:
    assert one(read([{"prompt": "a", "id": id}])).id == id


@pytest.mark.parametrize(
    "id",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "../x",
        "a b",
        "x" * 129,
        "ä",
        "a\n",
        "a\0",
        "a\\b",
        1.5,
        True,
        ["a"],
        2.0**53,
        10**200,
    ],
)
def test_a_bad_id_is_refused(read, id: Any) -> None:
    assert "id" in refusal(read([{"prompt": "a", "id": id}])).message


@pytest.mark.parametrize(("id", "digits"), [(7, "7"), (0, "0"), (-3, "-3"), (10**30, f"{10**30}"), (7.0, "7")])
def test_a_whole_number_as_id_is_taken_as_its_digits(read, id: Any, digits: str) -> None:
    assert one(read([{"prompt": "a", "id": id}])).id == digits


@pytest.mark.parametrize("key", ["seed", "width", "steps", "n"])
def test_a_float_that_is_whole_is_an_integer(read, key: str) -> None:
    given = 64.0 if key == "width" else 2.0
    assert read([{"prompt": "a", key: given}]) == read([{"prompt": "a", key: int(given)}])
    table = f"prompt,{key}\na,{given}\n".encode()
    assert read(table, ".csv")[0] == read(table.replace(b".0", b""), ".csv")[0]
    assert len(read(table, ".csv")[0]) == (2 if key == "n" else 1)


@pytest.mark.parametrize("seed", [-1, -1.0, None])
def test_a_seed_of_minus_one_is_none(read, seed: Any) -> None:
    assert one(read([{"prompt": "a", "seed": seed}])) == one(read([{"prompt": "a"}]))
    assert one(read(b"prompt,seed\na,-1\n", ".csv")).seed == one(read(b"prompt\na\n", ".csv")).seed


def test_an_id_must_stay_within_its_length_when_numbered(read) -> None:
    assert len(read([{"prompt": "a", "id": "x" * 126, "n": 10}])[0]) == 10
    assert "id" in refusal(read([{"prompt": "a", "id": "x" * 127, "n": 2}])).message


def test_ids_default_to_the_rows_index_with_blank_lines_not_counted(read) -> None:
    records, _ = read(b'\n{"prompt":"a"}\n  \n{"prompt":"b"}\n\r\n{"prompt":"c"}')
    assert [(record.id, record.line) for record in records] == [("000000", 2), ("000001", 4), ("000002", 6)]


def test_a_bad_row_still_counts_in_the_index(read) -> None:
    records, failures = read(b'{"prompt":"a"}\nbad\n{"prompt":"c"}\n')
    assert [record.id for record in records] == ["000000", "000002"]
    assert [(failure.id, failure.line) for failure in failures] == [(None, 2)]


def test_default_ids_grow_beyond_six_digits(tmp_path: Path) -> None:
    assert check_row({"prompt": "a"}, 1_234_567, 1, DEFAULTS)[0].id == "1234567"


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "x"}, {"id": "x"}],
        [{"id": "x-0"}, {"id": "x", "n": 2}],
        [{"id": "x", "n": 2}, {"custom_id": "x-1"}],
        [{"id": "000001"}, {}],
        [{}, {"id": "000000"}],
        [{"n": 2}, {"id": "000000-1"}],
        [{"n": 2}, {"id": "000000", "n": 2}],
        [{"id": None}, {"id": "000000"}],
    ],
    ids=str,
)
def test_a_second_row_with_a_used_id_is_refused(read, rows: list[dict[str, Any]]) -> None:
    records, failures = read([{"prompt": "a", **row} for row in rows])
    assert {record.line for record in records} == {1}
    assert [failure.line for failure in failures] == [2]
    assert "id" in failures[0].message


@pytest.mark.parametrize("id", ["000000", "000000-2", "000000-01", "0000000", "000002", "000001-0"])
def test_an_id_like_a_number_that_no_row_has_is_free(read, id: str) -> None:
    records, failures = read([{"prompt": "a", "n": 2}, {"prompt": "b", "id": id}])
    assert not failures
    assert len({record.id for record in records}) == 3


def test_a_failure_names_the_rows_own_id(read) -> None:
    _, failures = read([{"id": "x", "prompt": "a", "width": 100}, {"prompt": "a", "width": 100}])
    assert [failure.id for failure in failures] == ["x", "000001"]


# Formats


def test_a_text_file_is_a_prompt_a_line(read) -> None:
    records, failures = read('first prompt \r\n\n  "quoted", 星\t{"a": 1}\nlast'.encode(), ".txt")
    assert [record.prompt for record in records] == ["first prompt ", '  "quoted", 星\t{"a": 1}', "last"]
    assert [(record.id, record.line) for record in records] == [("000000", 1), ("000001", 3), ("000002", 4)]
    assert not failures


@pytest.mark.parametrize("column", ["Prompt", "prompt"])
def test_tsv_keeps_quotes_and_takes_extra_columns_to_meta(read, column: str) -> None:
    data = f'{column}\tCategory\tseed\nA sign that says "Hi"\tA,B\t5\n"open quote\tC\t\n'.encode()
    records, failures = read(data, ".tsv")
    assert not failures
    assert [(record.prompt, record.line) for record in records] == [('A sign that says "Hi"', 2), ('"open quote', 3)]
    assert [record.meta for record in records] == [{"Category": "A,B"}, {"Category": "C"}]
    assert records[0].seed == 5
    assert records[1].seed != 5


def test_csv_cells_have_the_types_of_their_keys(read) -> None:
    data = b"id,prompt,seed,width,height,steps,guidance,n,tag\n7,12,5,64,128,3,2.5,2,42\n8,13,,,,,4,,\n"
    records, failures = read(data, ".csv")
    assert not failures
    first = records[0]
    assert (first.id, first.prompt, first.seed, first.width, first.height) == ("7-0", "12", 5, 64, 128)
    assert (first.num_inference_steps, first.guidance_scale, first.meta) == (3, 2.5, {"tag": "42"})
    last = records[2]
    assert (last.id, last.width, last.height, last.num_inference_steps, last.guidance_scale) == ("8", 1024, 768, 28, 4)


def test_csv_quoting_keeps_commas_quotes_and_line_ends(read) -> None:
    records, failures = read(b'prompt,seed\r\n"one, ""two""\r\nthree",5\r\nplain,6\r\n', ".csv")
    assert not failures
    assert [(each.prompt, each.seed, each.line) for each in records] == [
        ('one, "two"\r\nthree', 5, 2),
        ("plain", 6, 4),
    ]


@pytest.mark.parametrize("cell", ["x", "1.5", "nan", "inf", "1e999", "1,5", "True", "--1"])
def test_a_cell_that_is_no_integer_is_refused(read, cell: str) -> None:
    records, failures = read(f"prompt\tseed\na\t{cell}\nb\t5\n".encode(), ".tsv")
    assert [record.seed for record in records] == [5]
    assert [(failure.line, failure.id) for failure in failures] == [(2, "000000")]
    assert "seed" in failures[0].message


@pytest.mark.parametrize("cell", ["x", "nan", "inf", "1e999"])
def test_a_cell_that_is_no_finite_number_is_refused(read, cell: str) -> None:
    assert "guidance must be" in refusal(read(f"prompt\tguidance\na\t{cell}\n".encode(), ".tsv")).message


@pytest.mark.parametrize("cell", ["1_0", "٣"])
def test_a_cell_that_only_python_reads_as_a_number_is_refused(read, cell: str) -> None:
    assert "guidance must be" in refusal(read(f"prompt\tguidance\na\t{cell}\n".encode(), ".tsv")).message


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_row_with_too_many_cells_costs_only_itself(read, suffix: str) -> None:
    comma = b"," if suffix == ".csv" else b"\t"
    records, failures = read(b"prompt,seed\na,1,2\nb,2\nc\n".replace(b",", comma), suffix)
    assert [(record.prompt, record.line) for record in records] == [("b", 3), ("c", 4)]
    assert [failure.line for failure in failures] == [2]


def test_an_unclosed_quote_in_csv_costs_only_its_own_row(read) -> None:
    records, failures = read(b'prompt,seed\nfirst,1\n"unclosed,2\nthird,3\nfourth,4\n', ".csv")
    assert [failure.line for failure in failures] == [3]
    assert [record.prompt for record in records] == ["first", "third", "fourth"]


@pytest.mark.parametrize("data", [b"", b"text,seed\na,1\n", b"prompt,Prompt\na,b\n", b"\xff\xfe\n"])
def test_a_table_without_one_prompt_column_is_no_input(read, data: bytes) -> None:
    with pytest.raises(InputError, match=r"input\.csv"):
        read(data, ".csv")


@pytest.mark.parametrize(
    ("suffix", "lines"),
    [
        (".jsonl", ['{"prompt": "a"}', '{"prompt": "b"}']),
        (".txt", ["a", "b"]),
        (".csv", ["prompt", "a", "b"]),
        (".tsv", ["Prompt", "a", "b"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_byte_order_marks_and_line_ends_of_windows_change_nothing(read, suffix, lines, end, mark) -> None:
    for last in ("", end):
        records, failures = read(mark + (end.join(lines) + last).encode(), suffix)
        assert [record.prompt for record in records] == ["a", "b"]
        assert [record.id for record in records] == ["000000", "000001"]
        assert not failures


@pytest.mark.parametrize(
    ("suffix", "data"),
    [(".jsonl", b'{"prompt": "a\xff"}\n{"prompt": "b"}\n'), (".txt", b"a\xff\nb\n"), (".csv", b"prompt\na\xff\nb\n")],
)
def test_invalid_utf8_costs_only_its_own_row(read, suffix: str, data: bytes) -> None:
    records, failures = read(data, suffix)
    assert [record.prompt for record in records] == ["b"]
    assert len(failures) == 1
    assert "UTF-8" in failures[0].message


@pytest.mark.parametrize("line", ["[]", '"a"', "7", "null", "{", "}", '{"prompt": "a"} x', "{'prompt': 'a'}", "\x00"])
def test_a_line_that_is_no_json_object_is_refused(read, line: str) -> None:
    records, failures = read(f'{line}\n{{"prompt": "b"}}\n'.encode())
    assert [record.prompt for record in records] == ["b"]
    assert [(failure.id, failure.line, failure.kind) for failure in failures] == [(None, 1, "invalid_row")]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_line_over_ten_mebibytes_costs_only_itself(read, suffix: str) -> None:
    wrap = b'{"prompt": "%s"}\n' if suffix == ".jsonl" else b"%s\n"
    records, failures = read(wrap % b"first" + wrap % (b"x" * MAX_LINE) + wrap % b"last", suffix)
    assert [(record.prompt, record.id) for record in records] == [("first", "000000"), ("last", "000002")]
    assert [failure.line for failure in failures] == [2]
    assert "10 MiB" in failures[0].message


def test_deep_nesting_costs_only_its_own_row(read) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    records, failures = read(b'{"prompt": "a", "x": %s}\n{"prompt": "b"}\n' % deep)
    assert [record.prompt for record in records] == ["b"]
    assert [failure.line for failure in failures] == [1]


@pytest.mark.parametrize("half", [rb"\ud83d", rb"\uDE00", rb"\ude00\ud83d"])
@pytest.mark.parametrize("key", ["prompt", "tag"])
def test_half_a_surrogate_pair_costs_only_its_own_row(read, key: str, half: bytes) -> None:
    row = b'{"prompt": "a", "%s": "x%sx"}' % (key.encode(), half)
    records, failures = read(row + b'\n{"prompt": "\\ud83d\\ude00"}\n')
    assert [record.prompt for record in records] == ["\N{GRINNING FACE}"]
    assert [failure.line for failure in failures] == [1]


def test_limit_takes_the_first_rows_good_or_bad(read) -> None:
    records, failures = read(b'{"prompt":"a","n":2}\nbad\n{"prompt":"c"}\nbad\n', limit=3)
    assert [record.id for record in records] == ["000000-0", "000000-1", "000002"]
    assert [failure.line for failure in failures] == [2]


def test_an_unknown_kind_of_input_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"prompts\.parquet"):
        PromptFile(str(path))


def test_a_prompts_bucket_is_the_smallest_that_holds_it(read) -> None:
    records, _ = read([{"prompt": "x" * length} for length in (1, 64, 65, 128, 256, 512, 513)])
    assert [record.text_length for record in records] == [64, 64, 128, 128, 256, 512, 512]
    assert [record.truncated for record in records] == [False] * 6 + [True]


# Whatever comes in


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_KEYS = """prompt id custom_id seed width height steps num_inference_steps guidance guidance_scale n num_images
num_images_per_prompt negative_prompt true_cfg_scale tag"""
_keys = st.sampled_from(sorted(_KEYS.split())) | st.text(max_size=8)
_likely = st.sampled_from(["a", "x", 1, 64, 100, 3.5, -1, "64", 2**63, "nan"]) | _values
_rows = st.dictionaries(_keys, _likely, max_size=6).map(lambda row: json.dumps({"prompt": "a", **row}).encode())
_lines = (st.binary(max_size=60) | _rows | st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace"))).map(
    lambda line: line.replace(b"\n", b" ").replace(b"\r", b" ")
)


def without_marks(line: bytes) -> bytes:
    while line.startswith(codecs.BOM_UTF8):
        line = line[3:]
    return line


def check_sound(record: PromptRecord) -> None:
    assert record.prompt.strip()
    record.prompt.encode()
    assert 0 < len(record.id) <= 128 and not record.id.startswith(".")
    assert 0 <= record.seed < 2**64
    assert record.width % 16 == record.height % 16 == 0
    assert 64 <= min(record.width, record.height) <= max(record.width, record.height) <= 4096
    assert 1 <= record.num_inference_steps <= 1000
    assert record.guidance_scale is not None and math.isfinite(record.guidance_scale)
    json.dumps(record.meta, allow_nan=False).encode()


@example([b"\x1c"], ".tsv")  # white space to str.strip, not to bytes.strip
@given(st.lists(_lines, max_size=4), st.sampled_from([".jsonl", ".txt", ".tsv"]))
@settings(max_examples=300, deadline=None)
def test_any_line_is_either_images_or_one_failure_and_never_an_exception(lines: list[bytes], suffix: str) -> None:
    good = {".jsonl": b'{"prompt": "first"}\n', ".tsv": b"prompt\tseed\n"}.get(suffix, b"first\n")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"input{suffix}"
        path.write_bytes(good + b"\n".join(lines) + b"\n")
        intake = take(path)
    told = {2 + number for number, line in enumerate(lines) if without_marks(line).strip()}
    made, refused = {record.line for record in images(intake)} - {1}, [failure.line for failure in intake.failures]
    assert len(refused) == len(set(refused))
    assert not made & set(refused)
    assert made | set(refused) == told
    assert all("\n" not in failure.message for failure in intake.failures)
    for record in images(intake):
        check_sound(record)


@given(st.binary(max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_bytes_as_csv_are_rows_and_failures_and_never_an_exception(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "input.csv"
        path.write_bytes(b"prompt,seed\n" + data)
        intake = take(path)
    assert intake.rows >= len(intake.failures)
    for record in images(intake):
        check_sound(record)
