"""Which rows have failed, how often, and of what: failures.jsonl, counted."""

import re
from pathlib import Path

from fluxcli.core.records import Failure
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import FailureRow

_DEFAULT_ID = re.compile(r"([0-9]{6,18})(-[0-9]+)?").fullmatch


class Failed:
    """Every row that failed. A row is known by its id, wherever it stands by now; one that has none of its own, by its
    line too, since its number is another row's after a row is added above."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str | None, int], tuple[int, int]] = {}  # (id, line) -> (attempt, hash of its error)
        self._ids: dict[str, int] = {}  # id -> attempts in runs before this one

    def take(self, row: FailureRow) -> None:
        """Takes in a row of an earlier run."""
        self._lines[row.id, row.line] = row.attempt, _said(row.error["type"], row.error["message"])
        if (
            row.id is not None
            and _is_own(row.id, row.line)
            and not _of_another(row.error["type"], row.error["message"])
        ):
            self._ids[row.id] = row.attempt

    def add(self, failure: Failure, run: int) -> FailureRow:
        """The row of one more failure."""
        key = failure.id, failure.line
        before = self._lines[key][0] if key in self._lines else self._ids.get(failure.id or "", 0)
        self._lines[key] = before + 1, _said(failure.kind, failure.message)
        return FailureRow(**failure.as_row(), attempt=before + 1, run=run)

    def says_already(self, failure: Failure) -> bool:
        """Whether the last failure of this row on this line was the very same."""
        last = self._lines.get((failure.id, failure.line))
        return last is not None and last[1] == _said(failure.kind, failure.message)

    def ids(self) -> set[str]:
        """Every id that has failed."""
        return {id for id, _ in self._lines if id is not None}

    def __contains__(self, row: tuple[str | None, int]) -> bool:
        """Whether the row of this id on this line has failed."""
        return row in self._lines or row[0] in self._ids


def read_failed(directory: Path) -> Failed:
    """A job's failures, seen from outside."""
    failed = Failed()
    for _, row in RowLog(directory / "failures.jsonl", FailureRow).read():
        if row is not None:
            failed.take(row)
    return failed


def _said(kind: str, message: str) -> int:
    return hash((kind, message))


def _of_another(kind: str, message: str) -> bool:
    """Whether the failure is about a row whose id belongs to another, which need not have failed."""
    return kind == "changed_row" or message.endswith("is already used by an earlier row")


def _is_own(id: str, line: int) -> bool:
    """Whether an id was given with its row: the default is the row's index, in six digits or more."""
    default = _DEFAULT_ID(id)
    return not (default and default[1] == f"{int(default[1]):06d}" and int(default[1]) < line)
