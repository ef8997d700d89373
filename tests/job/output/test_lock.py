"""One owner: where flock reaches, where it does not, and where somebody laid a trap."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fluxcli.core.errors import JobError
from fluxcli.job.output import lock as lock_module
from fluxcli.job.output.lock import Lock, problem_with

OWNER: dict[str, Any] = {"pid": 4711, "host": "elsewhere", "started_at": "2026-01-01T00:00:00.000Z", "run": 3}


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared disk whose flock reaches no other machine."""
    monkeypatch.setattr(fcntl, "flock", lambda *args: None)


def on(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "machine", lambda: machine)


@pytest.mark.usefixtures("unlocked")
def test_an_owner_on_a_machine_of_the_same_name_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on("one", monkeypatch)
    first = Lock(tmp_path)
    on("two", monkeypatch)
    with pytest.raises(JobError, match=rf"in use by pid {os.getpid()} on .*, alive 0 s ago"):
        Lock(tmp_path)
    first.check()
    first.release()


def test_an_owner_whose_successor_has_ended_commits_nothing_either(tmp_path: Path) -> None:
    owner = Lock(tmp_path)
    (tmp_path / ".lock").unlink()
    for check in (owner.check, lambda: owner.check(lately=True)):
        with pytest.raises(JobError, match=r"its \.lock is gone: another process took this job over"):
            check()
    owner.release()


@pytest.mark.usefixtures("unlocked")
def test_an_owner_taken_for_dead_commits_nothing_when_it_wakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on("one", monkeypatch)
    frozen = Lock(tmp_path)
    os.utime(tmp_path / ".lock", (0, 0))
    on("two", monkeypatch)
    second = Lock(tmp_path)
    assert second.crashed and second.crashed.pid == os.getpid()
    for check in (frozen.check, lambda: frozen.check(lately=True)):
        with pytest.raises(JobError, match="has taken this job over") as error:
            check()
        assert len(str(error.value).splitlines()) == 1
    frozen.release()
    second.check()
    assert (tmp_path / ".lock").exists(), "the lock is the second's to remove"
    second.release()
    assert not (tmp_path / ".lock").exists()


def test_a_dead_owner_of_this_machine_is_followed_at_once_whatever_its_host_was_called(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(json.dumps({**OWNER, "machine": lock_module.machine(), "token": "x"}))
    lock = Lock(tmp_path)
    assert lock.crashed and lock.crashed.run == 3
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_told_as_that(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(JobError, match="cannot be locked") as error:
        Lock(tmp_path)
    assert os.strerror(number) in str(error.value) and "in use" not in str(error.value)


@pytest.mark.parametrize("what", ["link", "dangling link", "hard link", "pipe", "directory"])
def test_a_lock_that_is_no_file_of_ours_is_refused_and_left(what: str, tmp_path: Path) -> None:
    directory, victim = tmp_path / "job", tmp_path / "rc"
    directory.mkdir()
    victim.write_text("precious")
    path = directory / ".lock"
    if what == "hard link":
        path.hardlink_to(victim)
    elif "link" in what:
        path.symlink_to(victim if what == "link" else tmp_path / "nowhere")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(JobError, match=r"\.lock: is "):
        Lock(directory)
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


HOSTILE = [
    "",
    "[]",
    "[" * 100_000,
    "x" * 100_000,
    json.dumps({**OWNER, "run": "a"}),
    json.dumps({**OWNER, "run": 1.5}),
    json.dumps({**OWNER, "run": -1}),
    json.dumps({**OWNER, "run": True}),
    '{"pid": 1, "host": "h", "started_at": "x", "run": 1e400}',
    json.dumps({**OWNER, "host": []}),
    json.dumps({**OWNER, "host": "\x1b]0;owned\x07"}),
    json.dumps({**OWNER, "pid": "\x1b[31m"}),
    json.dumps({**OWNER, "token": 5}),
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_lock_that_names_no_owner_is_nobodys(text: str, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(text)
    assert (problem_with(tmp_path) is None) == (text == ""), "zero bytes are what a crash leaves"
    lock = Lock(tmp_path)
    assert lock.crashed is None and problem_with(tmp_path) is None
    lock.release()


def test_a_directory_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    directory = tmp_path / "job"
    directory.mkdir()
    lock = Lock(directory)
    directory.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        lock.check()
    directory.mkdir()
    (directory / ".lock").touch()
    with pytest.raises(FileNotFoundError, match="replaced by another"):
        lock.check()
    lock.release()
    assert (directory / ".lock").exists()
