"""Rows that went through another program and came back changed in form only, as they were: pandas turns ids of digits
into numbers, times into milliseconds, numbers beside a gap into floats, and gaps into null."""

from dataclasses import MISSING, fields
from datetime import UTC, datetime
from typing import Any

from fluxcli.job.output import rows
from fluxcli.job.output.rows import BadRow, R

_MILLISECONDS = 10**11  # a larger time is in milliseconds, a smaller one in seconds


def row_of(kind: type[R], line: bytes) -> R | None:
    """The row of a line, put right if need be; None where it cannot be."""
    try:
        return rows.read(kind, line)
    except BadRow:
        return mended(kind, line)


def mended(kind: type[R], line: bytes) -> R | None:
    """The row that a line, which is none, was once; None where that cannot be told."""
    try:
        values = rows.read_object(line)
        for each in fields(kind):
            value = values.get(each.name)
            if value is None and each.name in values and each.default is not MISSING:
                del values[each.name]
            elif isinstance(value, float) and value.is_integer() and "int" in str(each.type):
                values[each.name] = int(value)
            elif each.name.endswith("_at") and isinstance(value, int | float):
                values[each.name] = _moment(value)
        if isinstance(values.get("id"), int | float) and isinstance(values.get("file_name"), str):
            values["id"] = _id(values["file_name"])
        return rows.make(kind, values)
    except (BadRow, ValueError, OverflowError, OSError):
        return None


def _moment(value: float) -> str:
    seconds = value / 1000 if value > _MILLISECONDS else value
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _id(file_name: Any) -> str:
    return str(file_name).rpartition("/")[2].rpartition(".")[0]
