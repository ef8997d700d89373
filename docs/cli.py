"""Writes docs/cli.md, the help of every command: `make docs`."""

from pathlib import Path

import click

from fluxcli.cli.main import cli

FILE = Path(__file__).with_suffix(".md")
WIDTH = 100
BEGINNING = """\
# The command line

The help of every command, as `fluxcli COMMAND --help` prints it. `make docs` writes it:
change the options, not this file.
"""
END = """\
## From the environment

| variable | what it sets |
| --- | --- |
| `FLUXCLI_MODEL` | the default of `--model` |
| `FLUXCLI_CACHE` | where compiled code is kept; `~/.cache/fluxcli` without it. Nobody else may be able to write there |
| `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` | where models from the hub are kept, by whose leave they come, if at all |
| `NO_COLOR` | no colour, wherever it goes |
"""


def text() -> str:
    commands = {"fluxcli": cli, **{f"fluxcli {name}": command for name, command in sorted(cli.commands.items())}}
    return "\n".join([BEGINNING, *(_section(path, command) for path, command in commands.items()), END])


def _section(path: str, command: click.Command) -> str:
    context = click.Context(
        command, info_name=path, terminal_width=WIDTH, help_option_names=cli.context_settings["help_option_names"]
    )
    return f"## {path}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
