"""Two jobs' rows joined by id. Of a row no more is held than finds it again, some bytes, so that there may be
millions."""

import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fluxcli.core.errors import JobError
from fluxcli.core.files import open_regular
from fluxcli.job.output import lock, rows
from fluxcli.job.output.identity import read_identity
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import BadRow, ManifestRow, RunRow
from fluxcli.job.output.sink import FileSink
from fluxcli.job.report import mend
from fluxcli.job.report.status import missing_of
from fluxcli.job.report.verify import require_job

_VALUES = 8  # of one setting that are told: a directory may come from anybody
NAMES = 64  # settings, likewise
EXAMPLES = 3  # ids that are told of rows alike
# What a row says that is no setting of it, or is looked at before. Whatever else two rows differ in is told.
_NO_SETTINGS = {
    "id", "prompt", "seed", "width", "height", "file_name", "sha256", "batch", "timing", "run", "finished_at", "meta",
    "worker", "extra",
}  # fmt: skip
_SETTINGS = [each.name for each in fields(ManifestRow) if each.name not in _NO_SETTINGS]
_Hashes = np.ndarray[Any, np.dtype[np.int64]]


class Told(NamedTuple):
    """Rows that have something in common: how many, and the ids of a few."""

    rows: int
    ids: list[str]


class Side:
    """One of two jobs, its manifest read once. To be closed.

    Attributes:
        unreadable: lines of the manifest that are no rows.
        missing: images that it still lacks, as `status.missing_of` counts them; 0 where nobody wrote down how many.
        owner: who .lock says is at work in the directory; None where nobody is.
        settings: the job's, as text by name.

    Raises:
        JobError: there is no job, or it has no image yet.
    """

    def __init__(self, directory: Path) -> None:
        require_job(directory)
        self.directory = directory
        self.unreadable = self.missing = 0
        owner = lock.owner(directory)
        self.owner = str(owner) if owner else None
        self._ids, self._offsets, self._lengths = array("q"), array("q"), array("I")
        self._manifest = RowLog(directory / "manifest.jsonl", ManifestRow)
        identity = read_identity(directory)
        self.settings = {name: shown for name, (_, shown) in identity.told().items()} if identity else {}
        last = self._read_runs()
        self._read_rows()
        self.missing = missing_of(identity.input if identity else None, last, len(self._ids)) or 0
        if not self._ids:
            raise JobError(f"{directory}: has no image yet: there is no row in its manifest.jsonl")
        self.sink = FileSink(directory, "")
        self._file = open_regular(self._manifest.path)

    def close(self) -> None:
        self.sink.close()
        os.close(self._file)

    @property
    def rows(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> _Hashes:
        """Hashes of the rows' ids, in the order of the manifest."""
        return np.frombuffer(self._ids, np.int64)

    def row(self, number: int) -> ManifestRow:
        """The manifest's `number`-th row.

        Raises:
            JobError: the manifest has changed since it was read.
        """
        line = os.pread(self._file, self._lengths[number], self._offsets[number])
        row = mend.row_of(ManifestRow, line)
        if row is None or hash(row.id) != self._ids[number]:
            raise JobError(f"{self._manifest.path}: changed while it was read; compare again")
        return row

    def lacking(self, both: _Hashes) -> Told:
        """The rows whose ids are not among `both`, each id once."""
        numbers = np.flatnonzero(np.isin(self.ids, both, invert=True, kind="sort"))
        first = np.sort(np.unique(self.ids[numbers], return_index=True)[1])
        return Told(len(first), [self.row(int(number)).id for number in numbers[first[:EXAMPLES]]])

    def _read_rows(self) -> None:
        offset, sizes = 0, set[int]()
        for number, line in self._manifest.lines():
            if len(line) > rows.LONGEST_LINE:  # it is not given whole, so where the next begins is not known
                raise self._manifest.bad(number, BadRow(f"is longer than {rows.LONGEST_LINE // 2**20} MiB"))
            row = mend.row_of(ManifestRow, line)
            if row is None:
                self.unreadable += 1
            else:
                self._ids.append(hash(row.id))
                self._offsets.append(offset)
                self._lengths.append(len(line))
                size = (row.batch or {}).get("size")
                if isinstance(size, int) and 0 < size < 2**16:
                    sizes.add(size)
            offset += len(line) + 1
        self._set("batch_size", [str(size) for size in sorted(sizes, reverse=True)])

    def _read_runs(self) -> RunRow | None:
        """The last run."""
        last = None
        found: dict[str, dict[str, None]] = {}  # a dict for a set in order
        for _, line in RowLog(self.directory / "runs.jsonl", RunRow).lines():
            run = mend.row_of(RunRow, line)
            if run is None:
                continue
            last = run
            for name, value in {"device": run.device, **(run.versions or {})}.items() if run.images else ():
                values = found.setdefault(name, {}) if len(found) < NAMES else found.get(name, {})
                if isinstance(value, str) and len(values) <= _VALUES:
                    values[_plain(value)] = None
        for name, values in found.items():
            self._set(_plain(name), list(values))
        return last

    def _set(self, name: str, values: list[str]) -> None:
        if values:
            told = ", ".join(values[:_VALUES]) + (", ..." if len(values) > _VALUES else "")
            self.settings.setdefault(name, told)


def _plain(text: str) -> str:
    return rows.shown(text)[1:-1]


class Joined:
    """Two jobs' rows by id. To be closed.

    Attributes:
        common: how many ids are in both.
        only_a, only_b: rows whose ids the other lacks.
        repeated: rows of ids that have one before them already, in both together.

    Raises:
        JobError: one of them is no job, or has no image.
    """

    def __init__(self, a: Path, b: Path) -> None:
        with ExitStack() as opened:
            self.a = opened.enter_context(closing(Side(a)))
            self.b = opened.enter_context(closing(Side(b)))
            both, self._in_a, self._in_b = np.intersect1d(self.a.ids, self.b.ids, return_indices=True)
            self.common = len(both)
            self.only_a, self.only_b = self.a.lacking(both), self.b.lacking(both)
            once = 2 * self.common + self.only_a.rows + self.only_b.rows
            self.repeated = self.a.rows + self.b.rows - once
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def places(self) -> Iterator[tuple[int, int]]:
        """Where A and B have the first rows of each id that is in both, in the order of A's manifest."""
        for number in np.argsort(self._in_a):
            yield int(self._in_a[number]), int(self._in_b[number])

    def differences(self) -> dict[str, tuple[str | None, str | None]]:
        """Settings that are not the same in both jobs, by name; None where a job has none of this name."""
        a, b = self.a.settings, self.b.settings
        return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def differing(a: ManifestRow, b: ManifestRow) -> list[str]:
    """The names of the settings in which two rows differ."""
    names = [name for name in _SETTINGS if getattr(a, name) != getattr(b, name)]
    if a.extra != b.extra:
        both = sorted(a.extra.keys() | b.extra.keys())
        names += [_plain(name) for name in both if a.extra.get(name) != b.extra.get(name)]
    return names[:NAMES]
