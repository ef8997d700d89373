"""A file of rows: appended for sure or not at all, and mended where a crash left its end."""

import errno
import os
from pathlib import Path

import pytest

from fluxcli.core.errors import JobError
from fluxcli.job.output import log as log_module
from fluxcli.job.output import rows
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import FailureRow, RunRow


def run(number: int, host: str = "h") -> RunRow:
    return RunRow(run=number, host=host)


def failure(run: int, line: int) -> FailureRow:
    return FailureRow(id=None, line=line, error={"type": "t", "message": "m"}, attempt=1, run=run)


@pytest.fixture
def log(tmp_path: Path) -> RowLog[RunRow]:
    log = RowLog(tmp_path / "runs.jsonl", RunRow)
    log.settle()
    return log


def numbers(log: RowLog[RunRow]) -> list[int]:
    return [row.run for _, row in log.read() if row is not None]


def test_what_is_appended_is_read(log: RowLog[RunRow]) -> None:
    log.append([run(0), run(1)])
    log.append([])
    log.append([run(2)])
    assert numbers(log) == [0, 1, 2]


def test_lines_longer_than_a_block_are_one_line(log: RowLog[RunRow], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_BLOCK", 7)
    log.append([run(0, "x" * 50), run(1)])
    assert [(number, row.host) for number, row in log.read() if row] == [(1, "x" * 50), (2, "h")]


def test_a_line_without_bound_is_not_taken_in(log: RowLog[RunRow], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_BLOCK", 10)
    monkeypatch.setattr(rows, "LONGEST_LINE", 50)
    log.append([run(0)])
    with log.path.open("ab") as file:
        file.write(b"x" * 1000 + b"\n" + rows.write(run(2)))
    lines = dict(log.lines())
    assert list(lines) == [1, 2, 3] and len(lines[2]) < 70
    with pytest.raises(JobError, match=r"runs\.jsonl, line 2: is longer than"):
        numbers(log)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_after_a_failed_append_there_is_no_other(
    log: RowLog[RunRow], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.append([run(0)])
    before = log.path.read_bytes()
    real, calls = getattr(os, call), 0

    def full(descriptor: int, *data: bytes) -> int:
        nonlocal calls
        calls += 1
        if call == "write" and calls == 1:
            return real(descriptor, data[0][:10])
        if calls <= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, *data)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        log.append([run(1)])
    with pytest.raises(OSError, match="No space"):  # though there would be room by now
        log.append([run(2)])
    assert log.path.read_bytes() == before, "what was written in part is cut off again"


def test_a_file_that_grew_behind_its_owners_back_is_not_appended_to(log: RowLog[RunRow]) -> None:
    log.append([run(0)])
    with log.path.open("ab") as file:
        file.write(rows.write(run(1)))
    with pytest.raises(JobError, match="changed by another process"):
        log.append([run(2)])
    assert numbers(log) == [0, 1]


def test_half_a_line_is_cut_and_a_whole_one_is_ended(log: RowLog[RunRow]) -> None:
    log.append([run(0)])
    with log.path.open("ab") as file:
        file.write(rows.write(run(1)).rstrip(b"\n"))
    assert log.torn() and log.settle() == 0
    with log.path.open("ab") as file:
        file.write(b'{"run": 2, "ho')
    assert log.settle() == 14 and not log.torn()
    log.append([run(3)])
    assert numbers(log) == [0, 1, 3]


def test_what_a_killed_process_left_is_on_disk_before_it_is_believed(
    log: RowLog[RunRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.path.write_bytes(rows.write(run(0)))
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    log.settle()
    assert str(log.path) in synced


def test_zeros_amid_the_last_append_are_a_crashs_and_passed_over(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "failures.jsonl", FailureRow)
    whole = [rows.write(failure(0, 1)), rows.write(failure(1, 2)), rows.write(failure(1, 3))]
    log.path.write_bytes(whole[0] + bytes(50) + whole[1][20:] + whole[2])
    assert [(number, row and row.line) for number, row in log.read()] == [(1, 1), (2, None), (3, 3)]


def test_zeros_before_a_later_append_are_no_crashs(tmp_path: Path) -> None:
    log = RowLog(tmp_path / "failures.jsonl", FailureRow)
    log.path.write_bytes(bytes(50) + b"\n" + rows.write(failure(1, 2)) + rows.write(failure(2, 3)))
    with pytest.raises(JobError, match=r"failures\.jsonl, line 1: holds zero bytes"):
        list(log.read())


@pytest.mark.parametrize("what", ["link", "pipe", "directory"])
def test_what_is_no_file_is_neither_read_nor_written(log: RowLog[RunRow], what: str, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_bytes(b"no end of line")
    if what == "link":
        log.path.symlink_to(precious)
    elif what == "pipe":
        os.mkfifo(log.path)
    else:
        log.path.mkdir()
    for act in (log.settle, lambda: log.append([run(0)]), lambda: list(log.lines()), log.torn):
        with pytest.raises(JobError, match=rf"runs\.jsonl: is a {what} where"):
            act()
    assert precious.read_bytes() == b"no end of line"
