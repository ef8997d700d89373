"""Standard streams that are full, closed or without a reader: a job goes on without its messages, and results that
cannot be written are one line and exit 1."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxcli.cli import streams
from fluxcli.cli.settings import say
from fluxcli.job.run import progress
from tests.cli.conftest import SMALL
from tests.conftest import ENVIRONMENT, read_rows, write_rows
from tests.job import harness

FLUXCLI = f"{sys.executable} -m fluxcli"


def shell(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("arguments", ["--version", "--help", "gen --help"])
@pytest.mark.parametrize(("where", "why"), [(">/dev/full", "No space left on device"), (">&-", "it is closed")])
def test_results_that_cannot_be_written_are_one_line(arguments: str, where: str, why: str, tmp_path: Path) -> None:
    done = shell(f"{FLUXCLI} {arguments} {where}", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"Error: standard output: cannot be written: {why}\n")


def test_a_reader_that_leaves_is_told_nothing(tmp_path: Path) -> None:
    done = shell(f"{FLUXCLI} --help | exec true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode in (0, 1)  # 0 where the help was in the pipe before its reader left
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["batch - -o out", "warmup -"])
def test_standard_input_that_is_closed_is_wrong_usage(command: str, tmp_path: Path) -> None:
    done = shell(f"{FLUXCLI} {command} {' '.join(map(str, SMALL[:2]))} <&-", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "Error: standard input is closed; there is nothing to read from it\n"


def test_a_job_goes_on_without_its_messages(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}])
    line = f"{FLUXCLI} batch in.jsonl -o out {' '.join(map(str, SMALL))} --json"
    done = shell(f"{line} 2>/dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    assert json.loads(done.stdout)["images"] == len(read_rows(tmp_path / "out" / "manifest.jsonl")) == 2
    untold = shell(f"{line} >/dev/full", tmp_path)
    assert untold.returncode == 1
    assert untold.stderr.splitlines()[-1] == "Error: standard output: cannot be written: No space left on device"
    assert read_rows(tmp_path / "out" / "runs.jsonl")[-1]["exit_status"] == 3


# The same of a job on a made-up engine, in a process of its own: every way to lose stderr, with lines and with the bar.


def full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)


def closed() -> None:
    os.close(2)
    sys.stderr = None  # type: ignore[assignment]  # as Python starts then


def unread() -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    os.dup2(ours, 2)


@pytest.mark.parametrize("lose", [full, closed, unread])
@pytest.mark.parametrize("bar", [False, True])
def test_a_job_goes_on_however_stderr_is_lost(lose: Callable[[], None], bar: bool, tmp_path: Path, monkeypatch) -> None:
    rows = harness.write_input(tmp_path / "rows.jsonl")
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    if bar:
        monkeypatch.setattr(streams._Messages, "isatty", lambda self: True)

    def run() -> int:
        lose()
        streams.protect()
        say("a message")
        job = harness.job(rows, tmp_path / "job")
        status, _ = job.run(lambda shapes: harness.SeedEngine(), {"device": "seed", "versions": {}}, say)
        opened = os.open(rows, os.O_RDONLY)
        assert opened > 2, "no file is opened under a standard stream's number"
        return status

    assert harness.forked(lambda: os._exit(run())) == 0
    assert len(harness.essence(tmp_path / "job")) == harness.ROWS


def test_results_are_told_as_the_bytes_they_are(tmp_path: Path) -> None:
    def run() -> None:
        os.dup2(os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT), 1)
        streams.protect()
        print(os.fsdecode(b"caf\xe9.png"))
        sys.stdout.flush()

    assert harness.forked(run) == 0
    assert (tmp_path / "out").read_bytes() == b"caf\xe9.png\n"


def test_what_a_terminal_would_obey_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say("line 2: got \x1b[2Jred\r\n\ttabs and lines, naïve 星")
    assert capsys.readouterr().err == "line 2: got \\u001b[2Jred\\u000d\n\ttabs and lines, naïve 星\n"


IMPORTING = """
import os, runpy, signal, sys
class Hook:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Hook)
sys.argv = ["fluxcli", *{arguments!r}]
{start}
"""
MODULE = "runpy.run_module('fluxcli', run_name='__main__', alter_sys=True)"
SCRIPT = "from fluxcli.__main__ import main; main()"


@pytest.mark.parametrize(
    ("module", "number", "start"),
    [
        ("click", 2, MODULE),
        ("click", 15, SCRIPT),
        ("fluxcli.cli.batch", 15, MODULE),
        ("torch", 2, SCRIPT),
        ("numpy._core.multiarray", 2, MODULE),
        ("transformers", 15, SCRIPT),
    ],
)
def test_a_signal_amid_an_import_is_a_stop(module: str, number: int, start: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    arguments = ["batch", "in.jsonl", *map(str, SMALL)]
    code = IMPORTING.format(module=module, number=number, arguments=arguments, start=start)
    done: Any = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.startswith("stopped by ") and len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not list(tmp_path.rglob("*.png"))


def test_a_stop_while_the_model_is_loaded_says_so_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    arguments = ["batch", "in.jsonl", "-o", "out", "--json", *map(str, SMALL)]
    code = IMPORTING.format(module="fluxcli.engine.engine", number=2, arguments=arguments, start=SCRIPT)
    done: Any = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    *remarks, last = done.stderr.splitlines()
    assert all(line.startswith("tiny was ") for line in remarks)
    assert last == ("stopped by SIGINT; everything finished is committed. Run the same command again to go on.")
    totals = json.loads(done.stdout)
    assert (totals["images"], totals["failures"], totals["exit_status"]) == (0, 0, 130)
    assert [row["exit_status"] for row in read_rows(tmp_path / "out" / "runs.jsonl")] == [130]
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_question_without_an_answer_is_no_stop(tmp_path: Path) -> None:
    rows = harness.write_input(tmp_path / "rows.jsonl")
    assert harness.run(rows, tmp_path / "job") == 0
    (tmp_path / "job" / "images" / "p1.png").unlink()
    done = shell(f"{FLUXCLI} verify --repair job", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("Error: no answer on standard input")
