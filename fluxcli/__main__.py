"""`python -m fluxcli` is the `fluxcli` command."""

from fluxcli.cli.main import main

main()
