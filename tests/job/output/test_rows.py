"""Rows of a job's files: one strict reader, one writer, and nothing of an unknown key lost between them."""

import json
from dataclasses import replace
from typing import Any

import pytest

from fluxcli.job.output import committed, rows
from fluxcli.job.output.rows import BadRow, FailureRow, ManifestRow, Row, RunRow

MANIFEST: dict[str, Any] = {
    "id": "a-1",
    "prompt": 'a "quoted" café',
    "file_name": "images/0001/a-1.png",
    "sha256": "0" * 64,
    "seed": 2**64 - 1,
    "width": 1024,
    "height": 64,
    "num_inference_steps": 28,
    "guidance_scale": None,
    "text_tokens": 17,
    "text_length": 64,
    "truncated": False,
    "batch": {"index": 3, "size": 16, "slot": 5},
    "worker": 2,
    "timing": {"total_s": 3.13},
    "run": 0,
    "finished_at": "2026-01-01T00:00:00.000Z",
    "meta": {},
}
FAILURE: dict[str, Any] = {
    "id": None,
    "line": 9,
    "error": {"type": "invalid_row", "message": "no"},
    "attempt": 1,
    "run": 0,
}
RUN: dict[str, Any] = {"run": 0, "host": "h", "planned": 4, "images": 4, "exit_status": None}
KINDS: list[tuple[type[Row], dict[str, Any]]] = [(ManifestRow, MANIFEST), (FailureRow, FAILURE), (RunRow, RUN)]


def line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_what_is_read_is_written_byte_for_byte_unknown_keys_too(kind: type[Row], values: dict[str, Any]) -> None:
    for told in (values, {**values, "maker": 3, "later": {"deep": [1]}}):
        assert rows.write(rows.read(kind, line(told))) == line(told)


MASKED = {"step_cache": "1101", "evaluated_steps": 3}


def test_a_row_made_under_a_mask_is_read_as_fast_as_any() -> None:
    """A start goes by the form of a row; one in another form would cost three times as much to read."""
    row = rows.read(ManifestRow, line({**MANIFEST, **MASKED, "guidance_scale": 3.5, "seed": 7}))
    plain = rows.read(ManifestRow, line({**MANIFEST, "guidance_scale": 3.5, "seed": 7}))
    assert (row.step_cache, row.evaluated_steps) == ("1101", 3)
    found, without = (committed._canonical(rows.write(each).rstrip()) for each in (row, plain))
    assert found is not None and without is not None and found[:-1] == without[:-1]
    assert found[1] == committed.content(row)


ADAPTED = [
    {"path": 'a "b" [c].safetensors', "sha256": "a" * 64, "scale": 1.0},
    {"path": "é", "sha256": "b" * 64, "scale": -2},
]


@pytest.mark.parametrize(("lora", "fast"), [(ADAPTED[1:], True), (ADAPTED, False)])
def test_a_row_made_with_adapters_is_read_as_fast_as_any(lora: list[dict[str, Any]], fast: bool) -> None:
    """But for paths with brackets; and its content is that of a row to make, wherever the files lie now."""
    from fluxcli.core.records import Adapter, PromptRecord

    row = rows.read(ManifestRow, line({**MANIFEST, "guidance_scale": 3.5, "seed": 7, "lora": lora}))
    assert row.lora == lora
    found = committed._canonical(rows.write(row).rstrip())
    assert (found is not None) == fast
    adapters = tuple(Adapter("elsewhere", each["sha256"], float(each["scale"])) for each in lora)
    record = PromptRecord(row.id, row.prompt, 7, 1024, 64, 28, 3.5, 1, adapters=adapters)
    assert committed.content(row) == committed.content(record) == (found[1] if found else committed.content(record))
    for other in ((), adapters[:-1], (*adapters[:-1], Adapter("é", "b" * 64, 2.0))):
        assert committed.content(row) != committed.content(
            PromptRecord(row.id, row.prompt, 7, 1024, 64, 28, 3.5, 1, adapters=other)
        )


@pytest.mark.parametrize("guidance", [None, 3.5])
@pytest.mark.parametrize("negative", ["", "ugly, 星 🐱", 'with "quotes"', "a \\ b", "\u009b\n\u202e"])
def test_a_row_with_true_cfg_is_known_by_its_negative_prompt_and_scale(negative: str, guidance: float | None) -> None:
    told = {**MANIFEST, "guidance_scale": guidance, "seed": 7, "negative_prompt": negative, "true_cfg_scale": 4.0}
    row = rows.make(ManifestRow, told)
    assert rows.read(ManifestRow, rows.write(row)) == row
    found = committed._canonical(rows.write(row).rstrip())
    assert found is None if json.dumps(negative, ensure_ascii=False) != f'"{negative}"' else found
    assert found is None or found[1] == committed.content(row)
    others = [{"negative_prompt": "x"}, {"true_cfg_scale": 4.5}, {"negative_prompt": None, "true_cfg_scale": None}]
    contents = [committed.content(replace(row, **other)) for other in others]
    assert len({committed.content(row), *contents}) == 4


def test_a_lacking_value_is_not_written_as_null() -> None:
    short = {key: value for key, value in MANIFEST.items() if key not in ("batch", "timing", "meta", "truncated")}
    assert rows.write(rows.read(ManifestRow, line(short))) == line(short)


WRONG = [
    (ManifestRow, "id", [None, 5, [], {}, True, "", ".hidden", "a/b", "a b", "x" * 200]),
    (ManifestRow, "prompt", [None, 5, ["a"], "\ud800"]),
    (ManifestRow, "step_cache", [5, "", "011", "1012", [1, 0], True]),
    (ManifestRow, "evaluated_steps", [0, -1, "3", 1.5, True]),
    (ManifestRow, "lora", ["a", {}, [5], [{}], [{**ADAPTED[0], "scale": "1"}], [{**ADAPTED[0], "sha256": "x"}]]),
    (ManifestRow, "sha256", [None, "x", "0" * 63, 0]),
    (ManifestRow, "seed", [None, -1, 2**64, 1.5, True, "7", 10**300]),
    (ManifestRow, "width", [None, 0, -64, 2**40, "64"]),
    (ManifestRow, "guidance_scale", ["3.5", True, []]),
    (ManifestRow, "run", [None, -1, 1.5, "0", True]),
    (ManifestRow, "finished_at", [None, 1767225600000, "", "yesterday", "2026-01-01", "9999-01-01T00:00:00Z"]),
    (ManifestRow, "worker", ["0", -1, 1.5, True]),
    (ManifestRow, "meta", [5, "x", []]),
    (FailureRow, "id", [5, [], {}, True]),
    (FailureRow, "line", [None, "x", 1.5, -1]),
    (FailureRow, "error", [None, "x", {}, {"type": 1, "message": "x"}]),
    (FailureRow, "attempt", [None, 0, "1"]),
    (RunRow, "run", [None, "0", [], -1, 1.5]),
    (RunRow, "planned", ["x", -1, 1.5]),
    (RunRow, "workers", ["0", {}]),
    (RunRow, "exit_status", ["0", 1.5]),
]


@pytest.mark.parametrize(("kind", "key", "values"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_value_is_named(kind: type[Row], key: str, values: list[Any]) -> None:
    good = dict(KINDS)[kind]
    for value in values:
        with pytest.raises(BadRow, match=rf"^{key} must be .*, not ") as error:
            rows.read(kind, json.dumps({**good, key: value}).encode())
        assert str(error.value).isprintable() and len(str(error.value)) < 200


@pytest.mark.parametrize(
    "name",
    [
        "images/../../home/thesis.txt", "/dev/zero", "../a-1.png", "images/a-1.txt", "images/b.png", "images/x/a-1.png",
        "images/0001/../a-1.png", "images//a-1.png", "images/a-1.png/", "images/1/a-1.png", "images/a-1.png\n", "",
        None,
    ],
)  # fmt: skip
def test_an_image_lies_nowhere_but_under_images_by_its_own_id(name: Any) -> None:
    with pytest.raises(BadRow, match="file_name must be"):
        rows.read(ManifestRow, json.dumps({**MANIFEST, "file_name": name}).encode())


@pytest.mark.parametrize("good", ["images/a-1.png", "images/0001/a-1.webp", "images/12345/a-1.jpg"])
def test_the_names_that_jobs_give(good: str) -> None:
    assert rows.read(ManifestRow, line({**MANIFEST, "file_name": good})).file_name == good


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"[1, 2]", "must be a JSON object, not a list of 2"),
        (b"null", "must be a JSON object"),
        (b"\x1b[31m", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b'{"run": NaN}', "NaN is no JSON number"),
        (b'{"run": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b"[" * 10**6 + b"]" * 10**6, "is nested too deeply"),
        (b'{"run": 0, "x": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "is nested too deeply"),
        (b"{}", "has no run"),
        (b"\0\0\0", "is not JSON"),
    ],
)
def test_what_is_no_row_at_all(data: bytes, wrong: str) -> None:
    with pytest.raises(BadRow, match=wrong):
        rows.read(RunRow, data)


def test_a_line_has_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_LINE", 100)
    with pytest.raises(BadRow, match="is longer than"):
        rows.read(RunRow, line({"run": 0, "x": "y" * 100}))
