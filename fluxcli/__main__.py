"""`python -m fluxcli` is the `fluxcli` command."""

from fluxcli.cli import main

main()
