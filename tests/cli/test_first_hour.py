"""The first hour with fluxcli, typed in a terminal of 80 and of 200 columns. Run by `pytest -m slow`, it leaves what
was shown in build/first-hour-80.txt and build/first-hour-200.txt, to be read with fresh eyes."""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxcli.engine.memory import host_free
from tests import terminal
from tests.conftest import ENVIRONMENT, write_rows

pytestmark = pytest.mark.slow
BUILD = Path(__file__).parents[2] / "build"
CTRL_C = b"\x03"
LONG = "--steps 250 --batch-size 1"  # a batch of some seconds
ROWS = [
    {"prompt": "a red circle above a blue square", "sed": 7, "tag": "x"},
    {"prompt": "a green star", "heigth": 64, "num_step": 4},
    {"prompt": "a black ring", "width": 100, "id": "\x1b[31mred\x1b]0;title\x07"},
    {"prompt": "a white ring on a red background " * 100},
]


class After:
    """Types each of the keys once the text, and what the key before led to, is shown. Anew in every `run`."""

    def __init__(self, text: str, *keys: bytes) -> None:
        self._wanted = [(text, keys[0]), *(("again quits now", key) for key in keys[1:])]

    def run(self) -> Callable[[str], bytes]:
        left = list(self._wanted)

        def typed(shown: str) -> bytes:
            if left and re.search(left[0][0], shown):
                return left.pop(0)[1]
            return b""

        return typed


# What is typed, the exit code, what has to be shown, and what is typed meanwhile.
HOUR: list[tuple[str, int, tuple[str, ...], After | None]] = [
    ("fluxcli", 2, ("Examples:", "Exit codes:", "FLUXCLI_CACHE"), None),
    ("fluxcli --help", 0, ("Run a job", "HF_TOKEN"), None),
    ("fluxcli batch --help", 0, ("Files:", "Speed:", "env var: FLUXCLI_MODEL"), None),
    ("fluxcli gen --help", 0, ("Images:", "-n, --num-images"), None),
    ("fluxcli warmup --seed 1", 2, ("--seed",), None),
    ('fluxcli gen "a photo of a cat"', 0, ("draws only plain shapes", "does not know the words photo, cat"), None),
    ('fluxcli gen "a red circle above a blue square" -o shapes -n 2', 0, ("shapes/a-red-circle",), None),
    ('fluxcli gen "a red circle" -m tiny --width 256 --steps 2', 0, ("was made for 128x128", "4 to 28 steps"), None),
    ('fluxcli gen "a fox" --device CUDA', 1, ("--device cuda", "--device cpu"), None),
    ('fluxcli gen "a fox" -m random:flux-dev', 1, ("67.5 GB in float32", "of this machine's memory"), None),
    ("fluxcli batch demo -o out --batch-size AUTO", 0, ("16/16", "16 images in", "0 failed"), None),
    ("fluxcli batch demo -o out --batch-size AUTO", 0, ("nothing to do: 16 images were done before",), None),
    ("fluxcli verify out", 0, ("16 good images, 0 problems",), None),
    ("fluxcli batch demo -o out --steps 12", 1, ("steps",), None),
    ("fluxcli batch demo -o quiet --limit 1 -q", 0, (), None),
    ("fluxcli batch rows.jsonl -o rows --dry-run", 3, ("did you mean seed?", "1 truncated"), None),
    (
        "fluxcli batch rows.jsonl -o rows --text-lengths 64",
        3,
        (
            "did you mean seed?",
            "did you mean height?",
            "did you mean num_inference_steps?",
            "1 with a truncated prompt",
        ),
        None,
    ),
    ("fluxcli batch rows.jsonl -o rows --text-lengths 64", 3, ("1 row failed, and no image was made",), None),
    ("fluxcli batch rows.jsonl -o one --limit 1", 0, ("1 image in",), None),
    ("fluxcli batch rows.jsonl -o s3://bucket/rows", 2, ("s3://bucket/rows is an address",), None),
    ("fluxcli batch nothere.jsonl", 2, ("nothere.jsonl",), None),
    ("fluxcli batch '\x1b[31mnothere\x07.jsonl'", 2, ("\\x1b[31mnothere\\x07.jsonl",), None),
    (f"fluxcli batch demo -o stopped {LONG}", 130, (r"batch in flight (about ",), After(" [1-9]/16", CTRL_C)),
    (
        f"fluxcli batch demo -o shared {LONG} --workers 2",
        130,
        ("after the 2 batches in flight (about ",),
        After(" [2-9]/16", CTRL_C),
    ),
    (f"fluxcli batch demo -o left {LONG}", 130, ("quitting now",), After(" [1-9]/16", CTRL_C, CTRL_C)),
    ("fluxcli batch demo -o stopped --steps 250 --limit 1", 0, ("done before",), None),
]


@pytest.mark.parametrize("columns", [80, 200])
def test_the_first_hour(columns: int, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    transcript, wrong = "", []
    for line, code, texts, typed in HOUR:
        if "random:flux-dev" in line and (host_free() or 10**12) > 67e9:
            continue
        words = [sys.executable, "-m", *shlex.split(line)]
        done = terminal.run(words, columns, tmp_path, ENVIRONMENT, typed.run() if typed else (lambda text: b""))
        shown = "\n".join(lines_of(done.text))
        transcript += f"$ {line}\n{shown}\n[{done.returncode}]\n\n".replace("\x1b", "^[").replace("\x07", "^G")
        wrong += [f"{line}: {fault}" for fault in faults(line, done, columns)]
        wrong += [] if done.returncode == code else [f"{line}: exit code {done.returncode}"]
        wrong += [f"{line}: {text!r} is not shown" for text in texts if text not in " ".join(shown.split())]
    BUILD.mkdir(exist_ok=True)
    (BUILD / f"first-hour-{columns}.txt").write_text(transcript, encoding="utf-8")
    assert not wrong, "\n".join(wrong)
    rows = (tmp_path / "stopped" / "manifest.jsonl").read_text().splitlines()
    assert 2 <= len(rows) < 16, "the batch in flight was committed"


def faults(line: str, done: terminal.Shown, columns: int) -> list[str]:
    """What no command may do to a terminal."""
    shown, told = lines_of(done.text), "--help" not in line and "--dry-run" not in line and line != "fluxcli"
    found = {
        "a code reached the terminal": re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", done.text),
        "a traceback": "Traceback" in done.text,
        "a blank line": told and "" in shown,
        "help is wider than the terminal": not told and max(map(len, shown)) > columns and "--dry-run" not in line,
        "is not quiet": "-q" in line.split() and shown,
    }
    return [fault for fault, seen in found.items() if seen]


def lines_of(text: str) -> list[str]:
    """What stands on the terminal's lines in the end, where a carriage return began them anew."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    return [next((part.rstrip() for part in reversed(line.split("\r")) if part.strip()), "") for line in lines]
