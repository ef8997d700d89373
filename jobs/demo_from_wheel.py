"""Runs the demo from an installed wheel, in an empty directory outside the clone: `make demo-from-wheel`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = "demo"  # the rows that come with fluxcli


def main(installed: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "FLUXCLI_CACHE": ""}
    with tempfile.TemporaryDirectory() as directory:

        def run(*words: object) -> str:
            command = [sys.executable, *map(str, words)]
            done = subprocess.run(
                command, cwd=directory, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            return done.stdout.strip()

        used = Path(run("-c", "import fluxcli; print(fluxcli.__file__)"))
        assert used.is_relative_to(installed), f"{used} is not the wheel's"
        assert (used.parent / "py.typed").is_file(), "the wheel says nothing of its types"
        run("-m", "fluxcli", "batch", DEMO, "--model", "tiny", "--device", "cpu", "-o", "out")
        run("-m", "fluxcli", "verify", "out")
        assert (installed / "share" / "man" / "man1" / "fluxcli.1").is_file(), "the wheel has no manual page"
        made = len(list(Path(directory, "out", "images").iterdir()))
    print(f"{made} images by {installed.name}'s own fluxcli, outside the clone")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
