"""`fluxcli`, and `python -m fluxcli`: signals are caught before anything large is imported."""

import sys

from fluxcli.job.run import signals


def main() -> None:
    if sys.platform == "win32":
        sys.exit("Error: fluxcli runs on Linux, macOS and WSL: on Windows install it inside WSL")
    signals.install()
    from fluxcli.cli.main import main

    main()


if __name__ == "__main__":
    main()
