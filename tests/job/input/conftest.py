"""What the tests of the input share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxcli.core.config import RowDefaults
from fluxcli.core.records import Failure, PromptRecord
from fluxcli.job.input.intake import Intake, take_in
from fluxcli.job.input.keys import NO_COLUMNS, Columns
from fluxcli.job.input.read import PromptFile

DEFAULTS = RowDefaults(1024, 768, 28, 3.5)
LENGTHS = (64, 128, 256, 512)


def take(
    path: Path,
    defaults: RowDefaults = DEFAULTS,
    format: Any = None,
    columns: Columns = NO_COLUMNS,
    **more: Any,
) -> Intake:
    """The intake of a file; a prompt's length counts as its tokens."""
    source = PromptFile(str(path), format, columns)
    return take_in(source, defaults, LENGTHS, lambda prompts: [len(each) for each in prompts], **more)


def images(intake: Intake) -> list[PromptRecord]:
    return intake.records(range(len(intake.groups)))


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[list[PromptRecord], list[Failure]]]:
    """Takes in rows (dicts, or raw bytes) and returns the images to make and the rows refused."""

    def read(data: bytes | list[Any], suffix: str = ".jsonl", **more: Any) -> tuple[list[PromptRecord], list[Failure]]:
        path = tmp_path / f"input{suffix}"
        path.write_bytes(
            data if isinstance(data, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in data)
        )
        intake = take(path, **more)
        return images(intake), intake.failures

    return read


def one(records: tuple[list[PromptRecord], list[Failure]]) -> PromptRecord:
    assert not records[1], records[1]
    assert len(records[0]) == 1
    return records[0][0]


def refusal(records: tuple[list[PromptRecord], list[Failure]]) -> Failure:
    assert not records[0]
    assert len(records[1]) == 1
    return records[1][0]
