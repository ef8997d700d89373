"""Fixtures all tests share: pipelines built once per session, and the command line in a subprocess."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import pipelines


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a pipeline, or hands out the one built before with the same arguments."""
    built: dict[Any, Path] = {}

    def get(shape: pipelines.Shape = pipelines.DEV, real: bool = False) -> Path:
        if (shape, real) not in built:
            built[shape, real] = pipelines.build(tmp_path_factory.mktemp("models") / shape.name, shape, real)
        return built[shape, real]

    return get


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FLUXCLI_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("FLUXCLI_MODEL", None)


class Result(subprocess.CompletedProcess[str]):
    """A finished command; `json` is its stdout, parsed."""

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


# One thread: the pictures are too small to gain from more, and machines that run tests are busy.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def command() -> Callable[..., Result]:
    """Runs the command line as a user does, in a process of its own and on the CPU, in the directory `cwd`."""

    def run(*args: object, cwd: Path, stdin: bytes | None = None, env: dict[str, str] | None = None) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "fluxcli", *map(str, args)],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            cwd=cwd,
            env={**os.environ, **ENVIRONMENT, **(env or {})},
            timeout=300,
        )
        return Result(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def fluxcli(command: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    """`command` in the test's own directory."""
    return partial(command, cwd=tmp_path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
