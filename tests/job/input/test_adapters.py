"""A row's `lora`: every form, every refusal, and what a row without one gets."""

import json
from dataclasses import replace
from typing import Any

import pytest

from fluxcli.core.errors import ModelError
from fluxcli.core.records import Adapter
from tests.job.input.conftest import DEFAULTS, one, refusal

LOOKED_UP: list[str] = []


def find(path: str, scale: float) -> Adapter:
    LOOKED_UP.append(path)
    if path.startswith("bad"):
        raise ModelError(f"{path}: no such\nfile")
    return Adapter(path, path.encode().hex().ljust(64, "0")[:64], scale)


JOBS = (find("job.safetensors", 0.5),)
OURS = replace(DEFAULTS, adapters=JOBS, adapter=find)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("a.safetensors", [("a.safetensors", 1.0)]),
        ("  a.safetensors ", [("a.safetensors", 1.0)]),
        ("a=0.5", [("a=0.5", 1.0)]),  # in a row a path is a path
        ({"path": "a"}, [("a", 1.0)]),
        ({"path": "a", "scale": 0.25}, [("a", 0.25)]),
        ([{"path": "a", "scale": -2}, "b"], [("a", -2.0), ("b", 1.0)]),
        ([{"path": "a"}, {"path": "a"}], [("a", 1.0), ("a", 1.0)]),
        ([], []),
        (None, [("job.safetensors", 0.5)]),
    ],
)
def test_what_a_row_may_say(read, value: Any, meant: list[tuple[str, float]]) -> None:
    record = one(read([{"prompt": "a", "lora": value}], defaults=OURS))
    assert [(each.path, each.scale) for each in record.adapters] == meant
    assert record.group.adapters == record.adapters and not record.meta


def test_a_row_that_says_nothing_gets_the_jobs(read) -> None:
    assert one(read([{"prompt": "a"}], defaults=OURS)).adapters == JOBS


@pytest.mark.parametrize(
    ("cell", "meant"),
    [
        ("a.safetensors", [("a.safetensors", 1.0)]),
        ('"[{""path"": ""a"", ""scale"": 0.5}]"', [("a", 0.5)]),
        ("[]", []),
        ("", [("job.safetensors", 0.5)]),
    ],
)
def test_a_tables_cell(read, cell: str, meant: list[tuple[str, float]]) -> None:
    record = one(read(f"prompt,lora\na,{cell}\n".encode(), ".csv", defaults=OURS))
    assert [(each.path, each.scale) for each in record.adapters] == meant


FORM = 'lora must be a path, or a list of {"path": ..., "scale": ...}'


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (4, f"{FORM}, got 4"),
        ("", f'{FORM}, got ""'),
        ("a\0b", f"{FORM}, got"),
        ({}, f"{FORM}, got {{}}"),
        ({"path": 4}, f"{FORM}, got"),
        ({"path": "a", "weight": 1}, f"{FORM}, got"),
        ([["a"]], f'{FORM}, got ["a"]'),
        ("[{", f'{FORM}, got "[{{"'),
        ("[" * 100_000, f"{FORM}, got"),
        (["a"] * 65, "lora must be at most 64 adapters, got 65"),
        ({"path": "a", "scale": "1"}, 'lora: scale must be a finite number, got "1"'),
        ({"path": "a", "scale": True}, "lora: scale must be a finite number, got true"),
        ({"path": "a", "scale": None}, "lora: scale must be a finite number, got null"),
        ({"path": "a", "scale": 10**400}, "lora: scale must be a finite number, got 1000"),
        ("bad.safetensors", "lora: bad.safetensors: no such\\nfile"),
    ],
)
def test_what_it_may_not(read, value: Any, message: str) -> None:
    records, failures = read([{"prompt": "a", "lora": value}, {"prompt": "b"}], defaults=OURS)
    assert [record.prompt for record in records] == ["b"], "a bad row costs no other"
    assert failures[0].message.startswith(message) and failures[0].line == 1


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "1e999"])
def test_scales_that_are_no_numbers(read, scale: str) -> None:
    failure = refusal(read(f'{{"prompt": "a", "lora": {{"path": "a", "scale": {scale}}}}}\n'.encode(), defaults=OURS))
    assert "number" in failure.message or "JSON" in failure.message


def test_every_image_of_a_row_has_them_and_equal_sets_are_one_object(read) -> None:
    rows = [{"prompt": "a", "n": 2, "lora": ["a", "b"]}, {"prompt": "b", "lora": json.dumps(["a", "b"])}]
    records, failures = read(rows, defaults=OURS)
    assert not failures and len(records) == 3
    assert len({id(record.adapters) for record in records}) == 1
