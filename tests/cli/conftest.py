"""What the tests of the command line share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import Result

SMALL = ("-m", "tiny", "--width", 64, "--height", 64, "--steps", 1)


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """As `fluxcli`, in this process, which has torch loaded already: for tests of many cases, on the CPU."""
    import torch

    from fluxcli.cli.main import cli

    threads = torch.get_num_threads()
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")  # --quiet sets it, for this process's good

    def run(*args: object, cwd: Path = tmp_path) -> Result:
        monkeypatch.chdir(cwd)
        torch.set_num_threads(1)
        try:
            done = CliRunner().invoke(cli, [*map(str, args), "--device", "cpu"], prog_name="fluxcli")
        finally:
            torch.set_num_threads(threads)
        return Result(list(args), done.exit_code, done.stdout, done.stderr)

    return run


def copy_of(directory: Path, to: Path) -> Path:
    """A directory a test may change, as it was left."""
    shutil.copytree(directory, to, dirs_exist_ok=True)
    return to


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
