"""The forms in which rows come: encodings, line ends, tables, JSON documents. What can be meant is read, what cannot is
refused once, and the same file read twice gives the same rows."""

import codecs
import gzip
import json
import lzma
import os
import tempfile
import threading
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fluxcli.core.errors import InputError, RowError
from fluxcli.job.input.keys import NO_COLUMNS, Columns
from fluxcli.job.input.raw import lines as lines_module
from fluxcli.job.input.raw.lines import MAX_LINE, lines
from fluxcli.job.input.raw.storage import Plain
from fluxcli.job.input.read import PromptFile
from tests.job.input.conftest import images, one, take

ROWS = {
    ".jsonl": ['{"prompt": "Bänke 星"}', '{"prompt": "b"}'],
    ".txt": ["Bänke 星", "b"],
    ".csv": ["prompt", "Bänke 星", "b"],
    ".tsv": ["Prompt", "Bänke 星", "b"],
    ".json": ["[", '{"prompt": "Bänke 星"},', '{"prompt": "b"}', "]"],
}
every_suffix = pytest.mark.parametrize("suffix", ROWS)


def prompts(found: Any) -> list[str]:
    assert not found[1], found[1]
    return [record.prompt for record in found[0]]


def scanned(path: Path, format: Any = None, columns: Columns = NO_COLUMNS) -> list[Any]:
    """(line, row) of each row; every good row reads the same again by its offset, in any order."""
    source = PromptFile(str(path), format, columns)
    rows = list(source.scan())
    assert [row.number for row in rows] == list(range(len(rows)))
    for row in reversed(rows):
        if isinstance(row.value, dict):
            assert source.read(row.offset, row.digest) == row.value
    source.close()
    return [(row.line, row.value if isinstance(row.value, dict) else str(row.value)) for row in rows]


# Encodings and line ends


@every_suffix
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.hex(),
)
def test_every_format_is_read_in_every_encoding_with_every_line_end(read, suffix, end, mark, encoding) -> None:
    for last in ("", end):
        text = end.join(ROWS[suffix]) + last
        assert prompts(read(mark + text.encode(encoding), suffix)) == ["Bänke 星", "b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_mark_at_any_lines_start_is_no_part_of_a_prompt(read, suffix: str, encoding: str) -> None:
    text = "\n".join("\ufeff" + line for line in ROWS[suffix])
    assert prompts(read(text.encode(encoding), suffix)) == ["Bänke 星", "b"]
    assert prompts(read(("\ufeff\ufeff\n" + text).encode(encoding), suffix)) == ["Bänke 星", "b"]


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n", "\n\r", "\r\r"])
def test_lines_are_counted_whatever_ends_them(read, end: str) -> None:
    _, failures = read(end.join(["a", "b" * 3, "\udcff"]).encode("utf-8", "surrogateescape"), ".txt")
    assert [failure.line for failure in failures] == [5 if end in ("\n\r", "\r\r") else 3]


FOREIGN = {
    "UTF-16 without a mark": ("a red circle\na blue square\n".encode("utf-16-le"), "byte 1 is 0x00", "iconv"),
    "the other UTF-16": ("a red circle\na blue square\n".encode("utf-16-be"), "byte 0 is 0x00", "iconv -f UTF-16BE"),
    "Chinese": ("一只红色的圆\n一只蓝色的方\n绿星\n上下\n".encode("utf-16-le"), "byte", "UTF-16LE"),
    "gzip in gzip": (gzip.compress(gzip.compress(b"a red circle\n")), "byte 0 is 0x1f", "gzip -dc"),
    "xz": (lzma.compress(b"a red circle\n"), "byte 0 is 0xfd", "xz -dc"),
    "parquet in gzip": (gzip.compress(b"PAR1\x15\x04\x15\x16"), "byte 4 is 0x15", "give it as a file"),
}


@every_suffix
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_kind_of_file_is_refused_once_with_its_first_bad_byte_and_what_to_do(read, suffix, kind) -> None:
    data, bad, remedy = FOREIGN[kind]
    with pytest.raises(InputError, match="input") as refused:
        read(data, suffix)
    message = str(refused.value)
    assert bad in message
    assert remedy in message
    assert "\n" not in message


@every_suffix
def test_a_workbook_renamed_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"input{suffix}"
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/workbook.xml", "<workbook/>")
    with pytest.raises(InputError, match=r"Excel.*0x03.*CSV UTF-8"):
        PromptFile(str(path))


@every_suffix
@pytest.mark.parametrize("data", [b"\0", b"\x3d\xd8", b"\x00\xdea\0"], ids=["half", "high", "low"])
def test_text_that_breaks_its_marks_promise_is_refused_with_its_first_bad_byte(read, suffix, data) -> None:
    text = "\n".join(ROWS[suffix]).encode("utf-16-le")
    read(codecs.BOM_UTF16_LE + text, suffix)
    with pytest.raises(InputError, match=rf"not valid UTF-16.*byte {2 + len(text) + 2} .*save it as UTF-8"):
        read(codecs.BOM_UTF16_LE + text + b"\n\0" + data, suffix)


def test_the_bad_byte_of_a_long_file_is_counted_from_its_start(read) -> None:
    text = ("x" * 999 + "\n") * 3000
    with pytest.raises(InputError, match=f"byte {2 + 2 * len(text)} "):
        read(codecs.BOM_UTF16_BE + text.encode("utf-16-be") + b"\xdc\x00", ".txt")


@pytest.mark.parametrize("stray", [b"\0", b"\0\0\0\0", b"a\0b\0", b"\xff\xfe", b"\x1f\x8b\x08", b"PK\x03\x04\0\0"])
def test_a_stray_line_of_such_bytes_costs_no_other_line(read, stray: bytes) -> None:
    records, failures = read(b'{"prompt": "a"}\n' + stray + b'\n{"prompt": "b"}\n')
    assert [record.prompt for record in records] == ["a", "b"]
    assert [failure.line for failure in failures] == [2]


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        (".jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n'),
        (".txt", b"a\ncaf\xe9\n"),
        (".csv", b"prompt\na\ncaf\xe9\n"),
    ],
)
def test_a_line_that_is_no_utf8_names_its_bad_byte_and_what_to_do(read, suffix: str, data: bytes) -> None:
    records, (failure,) = read(data, suffix)
    assert [record.prompt for record in records] == ["a"]
    assert failure.line == data.count(b"\n")
    assert "0xe9" in failure.message
    assert "save the file as UTF-8" in failure.message


@given(
    st.lists(st.sampled_from([b"\r", b"\n", b"a", b"bc", b"\xef\xbb\xbf", b"\xef", b""]), max_size=30),
    st.integers(1, 7),
)
def test_lines_split_anywhere_are_those_of_the_whole(parts: list[bytes], block: int) -> None:
    data = b"".join(parts)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        found = list(lines(Plain(file), 0, block))
        wanted = data.splitlines(keepends=True)
        assert [end - start for start, end, _ in found] == [len(line) for line in wanted]
        assert b"".join(data[start:end] for start, end, _ in found) == data
        for start, end, text in found:
            assert text is not None
            assert data[start:end].endswith(text)
            assert next(lines(Plain(file), start, block)) == (start, end, text)


def test_a_line_over_the_limit_is_never_held_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE", 20)
    data = b"a\n" + b"x" * 50 + b"\r\nb\r" + b"y" * 21 + b"\rc" + b"\n" + b"z" * 90
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file:
        for block in (1, 7, 25, 200):
            found = list(lines(Plain(file), 0, block))
            assert [text for _, _, text in found] == [b"a\n", None, b"b\r", None, b"c\n", None]
            assert [data[start:end][:2] for start, end, _ in found] == [b"a\n", b"xx", b"b\r", b"yy", b"c\n", b"zz"]


# Keys


SETTINGS = {"ID": "x1", "Prompt": "a red circle", "Seed": 7, "WIDTH": 64, " height ": 80, "Steps": 2, "Guidance": 4.5}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".json"])
def test_names_of_keys_and_columns_ignore_case_and_blanks(read, suffix: str) -> None:
    comma = {".csv": ",", ".tsv": "\t"}.get(suffix)
    row = json.dumps(SETTINGS)
    text = f"{comma.join(SETTINGS)}\n{comma.join(map(str, SETTINGS.values()))}\n" if comma else row
    record = one(read(f"[{row}]".encode() if suffix == ".json" else text.encode(), suffix))
    assert (record.id, record.prompt, record.seed, record.width, record.height) == ("x1", "a red circle", 7, 64, 80)
    assert (record.num_inference_steps, record.guidance_scale, record.meta) == (2, 4.5, {})


def test_blanks_after_commas_are_no_part_of_names_or_cells(read) -> None:
    record = one(read(b'prompt, seed, width, tag\n"a red, round circle", 7, 64, "x, y"\n', ".csv"))
    assert (record.prompt, record.seed, record.width, record.meta) == ("a red, round circle", 7, 64, {"tag": "x, y"})


def test_a_key_spelled_as_in_the_table_goes_before_one_that_is_not(read) -> None:
    record = one(read([{"Seed": 1, "prompt": "a", "seed": 2, "PROMPT": "b"}]))
    assert (record.prompt, record.seed, record.meta) == ("a", 2, {"Seed": 1, "PROMPT": "b"})
    _, (failure,) = read([{"prompt": "a", "Seed": 1, "SEED": 2}])
    assert "Seed is given twice (as SEED too)" in failure.message


@pytest.mark.parametrize("size", ["96x80", " 96 X 80 ", "96\u00d780"])
@pytest.mark.parametrize("key", ["size", "Size"])
def test_size_is_width_and_height(read, key: str, size: str) -> None:
    record = one(read([{"prompt": "a", key: size}]))
    assert (record.width, record.height, record.meta) == (96, 80, {})
    record = one(read(f"prompt,{key}\na,{size}\n".encode(), ".csv"))
    assert (record.width, record.height) == (96, 80)


@pytest.mark.parametrize("size", [None, "", "auto"])
def test_no_size_is_the_default(read, size: str | None) -> None:
    assert one(read([{"prompt": "a", "size": size}])) == one(read([{"prompt": "a"}]))


def test_a_missing_prompt_lists_the_keys_found(read) -> None:
    _, failures = read([{"caption": "a", "url": "b", "id": "x"}, {}, {f"key{n:02d}" * 20: 1 for n in range(50)}])
    assert "caption, url, id" in failures[0].message
    assert "--prompt-column" in failures[0].message
    assert all(len(failure.message) < 250 for failure in failures)
    assert "42 more" in failures[2].message


def test_no_code_of_a_terminals_stands_in_a_message(read) -> None:
    rows = [{"\x9b31m\u202e": 1}, {"prompt": "a", "seed": "\x1b[2J\x9b2J"}, {"prompt": "a", "id": "\u009b31m"}, "\x9b"]
    _, failures = read(rows)
    assert len(failures) == 4
    for failure in failures:
        assert failure.message.isprintable()
    assert r"\u009b31m" in failures[2].message


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".json"])
def test_the_prompts_and_the_ids_column_can_be_named(read, suffix: str) -> None:
    rows = [{"Caption": "a", "key": 1, "prompt": "not this", "id": "nor this"}, {"Caption": "b", "key": 2}]
    if suffix in (".csv", ".tsv"):
        lines = ["Caption,key,prompt,id", "a,1,not this,nor this", "b,2,,"]
        data = "\n".join(lines).replace(",", "," if suffix == ".csv" else "\t").encode()
    else:
        data = (json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))).encode()
    records, failures = read(data, suffix, columns=Columns("caption", "key"))
    assert not failures
    assert [(record.id, record.prompt) for record in records] == [("1", "a"), ("2", "b")]
    assert records[0].meta == {"prompt": "not this", "id": "nor this"}


def test_a_named_column_that_is_not_there_is_told(read) -> None:
    with pytest.raises(InputError, match="one column named text, got prompt,tag"):
        read(b"prompt,tag\na,b\n", ".csv", columns=Columns("text"))
    _, (failure,) = read([{"prompt": "a"}], columns=Columns("text"))
    assert "prompt is missing; the row has prompt" in failure.message
    with pytest.raises(InputError, match="has no columns"):
        read(b"a\n", ".txt", columns=Columns("text"))


def test_a_request_of_openais_batch_format_is_a_row(read) -> None:
    body = {"model": "flux", "prompt": "a blue square", "n": 2, "size": "96x80", "seed": 5, "quality": "hd"}
    request = {"custom_id": "r2", "method": "POST", "url": "/v1/images/generations", "body": body}
    records, failures = read([request])
    assert not failures
    assert [(record.id, record.prompt, record.seed) for record in records] == [
        ("r2-0", "a blue square", 5),
        ("r2-1", "a blue square", 6),
    ]
    assert (records[0].width, records[0].height) == (96, 80)
    assert records[0].meta == {
        "method": "POST",
        "url": "/v1/images/generations",
        "body": {"model": "flux", "quality": "hd"},
    }


def test_a_body_beside_a_prompt_or_without_one_is_like_any_other_key(read) -> None:
    assert one(read([{"prompt": "a", "body": {"prompt": "b", "seed": 1}}])).meta == {"body": {"prompt": "b", "seed": 1}}
    _, (failure,) = read([{"custom_id": "r", "body": {"messages": []}}])
    assert "prompt is missing; the row has custom_id, body" in failure.message


# Tables


@pytest.mark.parametrize(
    "text",
    [
        "id;prompt;seed\na1;a red circle, on white;7\n",
        "sep=;\nid;prompt;seed\na1;a red circle, on white;7\n",
        '"sep=;"\r\nid;prompt;seed\r\na1;"a red circle, on white";7\r\n',
        "sep=|\nid|prompt|seed\na1|a red circle, on white|7\n",
        'sep=,\nid,prompt,seed\na1,"a red circle, on white",7\n',
        "id\tprompt\tseed\na1\ta red circle, on white\t7\n",
        "\n\nid;prompt;seed\n\na1;a red circle, on white;7\n",
        'id,prompt,seed,\na1,"a red circle, on white",7,\n',
        'id,prompt,seed\na1,"a red circle, on white",7,,\n',
        ',id,prompt,seed\n,a1,"a red circle, on white",7\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_tables_as_spreadsheets_write_them_are_read(read, text: str, encoding: str) -> None:
    record = one(read(text.encode(encoding), ".csv"))
    assert (record.id, record.prompt, record.seed, record.meta) == ("a1", "a red circle, on white", 7, {})
    assert record.line == text.splitlines().index(next(line for line in text.splitlines() if "red" in line)) + 1


@pytest.mark.parametrize("line", ["sep=", 'sep="', "sep=x", "sep=  ", "sep=;;"])
def test_what_is_no_separators_line_is_a_header(read, line: str) -> None:
    with pytest.raises(InputError, match=r"input\.csv: the header"):
        read(f"{line}\nprompt\na\n".encode(), ".csv")


def test_a_column_without_a_name_keeps_what_it_holds(read) -> None:
    records, failures = read(b",prompt,\n0,a,x\n1,b,\n", ".csv")
    assert not failures
    assert [record.meta for record in records] == [{"column 1": "0", "column 3": "x"}, {"column 1": "1"}]


def test_cells_of_a_tsv_quoted_as_a_whole_are_unquoted(read) -> None:
    text = (
        "id\tprompt\n"
        '1\t"a sign that says ""OPEN"""\n'
        '2\t"line one\nline two"\n'
        '3\tplain "quoted" word\n'
        '4\t"open quote\n'
        '5\tthe sign says "Hi"\n'
        '6\t"a\ttab"\n'
        '7\t"Hi" and "bye"\n'
        '8\t""\n'
        '9\t"three\n\n""lines"""\n'
        "10\tlast"
    )
    records, (failure,) = read(text.encode(), ".tsv")
    assert [(record.id, record.prompt) for record in records] == [
        ("1", 'a sign that says "OPEN"'),
        ("2", "line one\nline two"),
        ("3", 'plain "quoted" word'),
        ("4", '"open quote'),
        ("5", 'the sign says "Hi"'),
        ("6", "a\ttab"),
        ("7", '"Hi" and "bye"'),
        ("9", 'three\n\n"lines"'),
        ("10", "last"),
    ]
    assert [record.line for record in records] == [2, 3, 5, 6, 7, 8, 9, 11, 14]
    assert (failure.line, failure.message) == (10, "prompt is empty")


def test_a_tsv_of_one_column_keeps_open_quotes_and_joins_closed_ones(read) -> None:
    records, _ = read(b'prompt\n"open\nplain\n"one\ntwo"\n"whole"\n', ".tsv")
    assert [record.prompt for record in records] == ['"open', "plain", "one\ntwo", "whole"]


def test_an_open_quote_before_other_cells_stays_as_it_is(read) -> None:
    """As in PartiPrompts, one of whose prompts begins with a quote and does not end with one."""
    records, failures = read(b'Prompt\tCategory\n"Quote\tArts\nhe said "hi"\tPeople\nend"\tArts\n', ".tsv")
    assert not failures
    assert [record.prompt for record in records] == ['"Quote', 'he said "hi"', 'end"']


# JSON documents


DOCUMENTS = {
    "a list on one line": '[{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y", "seed": 7}]',
    "a list over lines": json.dumps([{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y", "seed": 7}], indent=2),
    "a row a line": '[{"id": "a", "prompt": "x"},\n{"id": "b", "prompt": "y", "seed": 7}\n]\n',
    "an object by id": '{"a": {"prompt": "x"}, "b": {"prompt": "y", "seed": 7}}\n',
    "an object by id over lines": json.dumps({"a": {"prompt": "x"}, "b": {"prompt": "y", "seed": 7}}, indent=1),
    "ids in the rows": '{"0": {"id": "a", "prompt": "x"}, "1": {"ID": "b", "prompt": "y", "seed": 7}}',
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_json_document_is_rows(read, kind: str, suffix: str) -> None:
    records, failures = read(DOCUMENTS[kind].encode(), suffix)
    assert not failures
    assert [(record.id, record.prompt) for record in records] == [("a", "x"), ("b", "y")]
    assert records[1].seed == 7
    many = kind in ("a row a line",)
    assert [record.line for record in records] == (
        [1, 2] if many else [2, 6] if kind == "a list over lines" else [2, 5] if "over" in kind else [1, 1]
    )


def test_a_list_of_texts_is_prompts(read) -> None:
    assert prompts(read('["a", "Bänke 星", "quote \\" [ {"]'.encode(), ".json")) == ["a", "Bänke 星", 'quote " [ {']
    assert prompts(read(b"[]", ".json")) == []


def test_a_bad_row_of_a_document_costs_no_other(read) -> None:
    rows = ['{"prompt": "a"}', "7", '{"prompt": "b", "x": }', '{"prompt": "c"}', "null", '{"prompt": "d", "seed": -5}']
    records, failures = read(("[" + ",\n".join(rows) + "]").encode(), ".json")
    assert [(record.prompt, record.id, record.line) for record in records] == [("a", "000000", 1), ("c", "000003", 4)]
    assert [failure.line for failure in failures] == [2, 3, 5, 6]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"prompt": "a"},\n{"prompt": "b"}', "line 2: .* expected , or ]"),
        ('[{"prompt": "a"},\n{"prompt": "b"', "line 2: .*ends amid a row"),
        ('[{"prompt": "a"}\n\n{"prompt": "b"}]', "line 3: .*expected , or ]"),
        ('[\n{"prompt": "a"}\n{"prompt": "b"}\n', "line 3: .*expected , or ]"),
        ('[{"prompt": "a"}\n]\n\n}', "line 4: .*more follows"),
        ('{"a": {"prompt": "a"},\n"b" {"prompt": "b"}}', "line 2: .*expected :"),
    ],
)
def test_a_document_that_breaks_off_is_refused_once_with_its_line(read, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(text.encode(), ".json")


def test_one_row_over_several_lines_is_refused_once(read) -> None:
    with pytest.raises(InputError, match="each on a line of its own"):
        read(json.dumps({"prompt": "a", "seed": 7}, indent=1).encode(), ".json")


@pytest.mark.parametrize(
    "first", ["[]", "[1, 2]", '["a"]', '[{"prompt": "x"}]', "{", '{"x": {"y": 1}, bad', "{}", "[" * 1000]
)
def test_a_line_that_looks_like_a_documents_start_costs_no_other(read, first: str) -> None:
    records, failures = read(f'{first}\n{{"prompt": "b"}}\n'.encode())
    assert [(record.prompt, record.line) for record in records] == [("b", 2)]
    assert [failure.line for failure in failures] == [1]


def test_a_row_with_objects_is_a_row(read) -> None:
    assert one(read([{"meta": {"a": 1}, "prompt": "x"}])).meta == {"meta": {"a": 1}}
    _, (failure,) = read(b'{"conversations": {"from": "human"}, "n": 1}\n')
    assert "prompt is missing" in failure.message


def test_a_long_document_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[" + ",".join(json.dumps({"prompt": f"row {n}", "x": "y" * 1000}) for n in range(22_000)) + "]")
    assert path.stat().st_size > 20 * 2**20
    source = PromptFile(str(path))
    tracemalloc.start()
    count = sum(1 for row in source.scan() if isinstance(row.value, dict))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 22_000
    assert peak < 6 * 2**20


def test_a_row_over_the_limit_in_a_document_costs_only_itself(read) -> None:
    data = b'["a", {"prompt": "%s \\" ]"}, "b"]' % (b"x" * MAX_LINE)
    records, (failure,) = read(data, ".json")
    assert [record.prompt for record in records] == ["a", "b"]
    assert "10 MiB" in failure.message


# Streams and formats by name


@pytest.mark.parametrize("format", ["jsonl", "txt", "csv", "tsv"])
def test_the_format_can_be_said_for_any_name(tmp_path: Path, format: str) -> None:
    for name in ("rows", "rows.dat", "rows.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(ROWS[f".{format}"]))
        assert [record.prompt for record in images(take(path, format=format))] == ["Bänke 星", "b"]


@pytest.mark.parametrize(("name", "format"), [("pipe.csv", None), ("pipe", None), ("pipe", "txt")])
def test_a_pipe_is_read_once_and_its_rows_again(tmp_path: Path, name: str, format: Any) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    text = ROWS[f".{format or ('csv' if '.' in name else 'jsonl')}"]
    writer = threading.Thread(target=lambda: path.write_text("\n".join(text)))
    writer.start()
    assert [record.prompt for record in images(take(path, format=format))] == ["Bänke 星", "b"]
    writer.join()


def test_a_device_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/dev/zero"):
        PromptFile("/dev/zero")


# Whatever comes in


HEADS = (
    b"", b"prompt\n", b"prompt\tseed\n", b"id,prompt,tag\n", b"sep=;\nprompt;a\n", b"sep=",
    b"[", b'[{"prompt":"a"},', b'{"a":{},',
)  # fmt: skip
_cells = st.sampled_from(['"', '""', "a", "\t", ",", "\n", "\r", "\r\n", ";", " ", "é", "\0", "x y"])
_json = st.sampled_from([*'{}[]",:\\ \n\r1', '"prompt"', '"a"', '{"prompt":"a"}'])
_text = st.lists(_cells, max_size=30) | st.lists(_json, max_size=30)
_bytes = _text.map(lambda parts: "".join(parts).encode()) | st.binary(max_size=60)
_heads = st.sampled_from([*HEADS, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF8])


@example(b'["a"\r', b"]", ".json")
@example(b"prompt\tseed\n", b'"\t\n"\ta\r"\t', ".tsv")
@given(_heads, _bytes, st.sampled_from([".jsonl", ".json", ".txt", ".csv", ".tsv"]))
@settings(max_examples=600, deadline=None)
def test_any_bytes_are_rows_or_one_refusal_and_read_again_as_they_were(head: bytes, data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"input{suffix}"
        path.write_bytes(head + data)
        try:
            rows = scanned(path)
        except InputError as error:
            assert "\n" not in str(error)
            assert str(error).isprintable() or str(path) in str(error)
            return
    assert [line for line, _ in rows] == sorted(line for line, _ in rows)
    assert all(1 <= line <= len((head + data).splitlines()) + 1 for line, _ in rows)


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), min_size=1, max_size=12), min_size=1),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
@settings(max_examples=150, deadline=None)
def test_what_other_programs_write_comes_back(texts: list[str], end: str) -> None:
    import csv
    import io

    texts = list(dict.fromkeys(text for text in texts if text.strip() and text[0] not in '"\r\n'))
    rows = [{"Prompt": text, "Tag": text[::-1]} for text in texts]
    with tempfile.TemporaryDirectory() as directory:
        for suffix, delimiter in ((".csv", ","), (".csv", ";"), (".json", None), (".jsonl", None)):
            if delimiter:
                file = io.StringIO(newline="")
                form: Any = {"delimiter": delimiter, "lineterminator": end, "quoting": csv.QUOTE_ALL}
                writer = csv.DictWriter(file, ["Prompt", "Tag"], **form)
                writer.writeheader()
                writer.writerows(rows)
                text = file.getvalue()
            else:
                text = json.dumps(rows) if suffix == ".json" else end.join(map(json.dumps, rows))
            path = Path(directory) / f"input{suffix}"
            path.write_bytes(text.encode())
            found = scanned(path)
            assert [value for _, value in found] == rows, suffix
            if suffix == ".jsonl":
                assert [line for line, _ in found] == list(range(1, len(rows) + 1))
            for line, row in found if delimiter else ():
                before = b"".join(text.encode().splitlines(keepends=True)[: line - 1])
                assert text.encode().removeprefix(before).startswith(b'"' + row["Prompt"].split("\n")[0][:1].encode())
                reader = csv.reader(io.StringIO(before.decode(), newline=""), delimiter=str(delimiter))
                assert len(list(reader)) == 1 + rows.index(row)


def test_a_scan_may_go_on_while_rows_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "input.csv"
    path.write_text("prompt\n" + "".join(f'"row\n{n}"\n' for n in range(50)))
    source = PromptFile(str(path))
    first: Any = None
    for row in source.scan():
        first = first or row
        assert not isinstance(row.value, RowError)
        assert source.read(first.offset, first.digest) == {"prompt": "row\n0"}
    assert row.number == 49
