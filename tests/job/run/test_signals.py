"""Signals from the command's first line to its last: an exit code, one line, and nothing that a handler raised."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fluxcli.job.run import signals
from fluxcli.job.run.signals import Stopped

NUMBERS = [signal.SIGINT, signal.SIGTERM]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process that belongs to the command; `stop()` sends it the signal named by its argument."""
    whole = f"""
import os, signal, sys
from fluxcli.job.run import signals
signals.install()
def stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
{textwrap.dedent(code)}
"""
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_stop_amid_an_import_that_catches_everything_is_a_stop(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "careless.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\n    x = 1\nexcept BaseException:\n    pass\n"
    )
    done = run(f"sys.path.insert(0, {str(tmp_path)!r})\nimport careless\nprint('went on')")
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == f"stopped by {number.name}; run the same command again\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_held_ends_by_itself(number: signal.Signals) -> None:
    done = run(f"""
        try:
            with signals.held():
                stop({int(number)})
                print("finished", signals.noted())
                signals.check()
        except signals.Stopped as stopped:
            print(stopped)
            sys.exit(stopped.exit_code)
    """)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert done.stdout == f"finished True\nstopped by {number.name}\n"


def test_a_second_signal_ends_what_is_held() -> None:
    done = run("with signals.held():\n    stop()\n    stop(signal.SIGINT)\n    print('went on')")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_what_is_in_flight_is_told_at_the_first_signal_and_at_the_second_that_it_is_not_waited_for() -> None:
    done = run("""
        with signals.in_flight(lambda: "stopping after the batch"), signals.held():
            stop()
            print("held", flush=True)
            stop(signal.SIGINT)
            print("went on")
    """)
    assert (done.returncode, done.stdout) == (130, "held\n")
    assert done.stderr.splitlines() == [
        "stopping after the batch",
        "quitting now; what is committed stays. Run the same command again to go on.",
    ]


def test_words_that_fail_stop_nothing() -> None:
    done = run("with signals.in_flight(lambda: 1 / 0), signals.held():\n    stop()\nprint(signals.noted())")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_the_last_words_are_those_of_the_work_that_is_under_way() -> None:
    done = run("""
        with signals.last_words(lambda stopped: print("wrong")):
            pass
        with signals.last_words(lambda stopped: print(stopped, stopped.exit_code, flush=True)):
            with signals.held():
                pass
            stop()
    """)
    assert (done.returncode, done.stdout, done.stderr) == (143, "stopped by SIGTERM 143\n", "")


def test_last_words_that_fail_are_told_and_change_no_exit_code() -> None:
    done = run("with signals.last_words(lambda stopped: 1 / 0):\n    stop()")
    assert (done.returncode, done.stderr) == (143, "Error: division by zero\n")


def test_a_signal_while_a_message_is_written_is_told_too() -> None:
    """stderr's buffer is not to be entered twice."""
    done = run("""
        import io
        from fluxcli.cli.settings import say
        class Slow(io.RawIOBase):
            def writable(self):
                return True
            def write(self, data):
                stop()
                return len(data)
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(Slow()), write_through=True)
        with signals.last_words(lambda stopped: say("these words")):
            say("x")
    """)
    assert (done.returncode, done.stderr) == (143, "these words\n")


def test_a_fork_has_none_of_its_parents_work() -> None:
    done = run("""
        with signals.held():
            child = os.fork()
            if not child:
                stop()
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), signals.noted())
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "143 False\n", "")


def test_no_child_is_left_behind() -> None:
    done = run("""
        import multiprocessing, time
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        child.start()
        print(child.pid, flush=True)
        stop()
    """)
    assert done.returncode == 143
    with pytest.raises(ProcessLookupError):
        while True:  # until init has reaped it
            os.kill(int(done.stdout), 0)
            stat = Path(f"/proc/{done.stdout.strip()}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "Z":
                raise ProcessLookupError


def test_in_somebody_elses_process_handlers_are_lent() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    for _ in range(2):
        with signals.held(), signals.held():
            assert not signals.noted()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Stopped, match="SIGTERM"):
                signals.check()
    assert [signal.getsignal(number) for number in NUMBERS] == before
