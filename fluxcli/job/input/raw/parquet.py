"""Parquet as JSON lines, a line a row, made by `parquet_rows` in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from fluxcli.core.errors import InputError
from fluxcli.core.terminal import printable_line
from fluxcli.job.input.raw.storage import BLOCK, blocks_of

BEGINNING = b"PAR1\x15"  # its magic bytes, and how the first page's header starts
_PROGRAM = Path(__file__).with_name("parquet_rows.py")


def lines_of(name: str, file: IO[bytes], check: Callable[[Sequence[str]], None]) -> Iterator[bytes]:
    """The rows of a parquet file, columns of bytes left out.

    Args:
        check: given the columns' names before the first row; raises where there is none to take.

    Raises:
        InputError: it is damaged, wants more memory than a file of prompts may, or pyarrow is not there.
    """
    if find_spec("pyarrow") is None:
        raise InputError(
            f"{name}: is parquet, which fluxcli[parquet] reads; install that, or write its rows as .jsonl or .csv"
        )
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # what is found here is found there
    with tempfile.TemporaryFile() as told:
        program = subprocess.Popen(
            [sys.executable, "-P", _PROGRAM],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=told,
            env={**os.environ, **paths},
        )
        assert program.stdout is not None
        with program.stdout as rows:
            try:
                if names := rows.readline(BLOCK):
                    check(json.loads(names))
                yield from blocks_of(rows)
            except BaseException:
                program.kill()
                raise
            finally:
                rows.close()
                status = program.wait()
        if status:
            told.seek(0)
            last = told.read(BLOCK).decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise InputError(f"{name}: cannot be read as parquet: {printable_line(last)[:300] or f'status {status}'}")
