"""Writes docs/fluxcli.1, the manual page that the wheel brings along, from the help of every command: `make docs`."""

import re
from pathlib import Path

import click

from fluxcli.cli.main import cli

FILE = Path(__file__).with_name("fluxcli.1")


def text() -> str:
    """The page in the man macros. It has no date, which would make it another each day."""
    parts = ['.TH FLUXCLI 1 "" "fluxcli" "User Commands"', ".SH NAME", "fluxcli \\- prompts into FLUX.1 images"]
    parts += [".SH SYNOPSIS", ".B fluxcli", "\\fICOMMAND\\fR [\\fIOPTIONS\\fR] \\fIARGUMENTS\\fR"]
    parts += [".SH DESCRIPTION", *_prose(cli.help or ""), "Each command tells its options with \\fB\\-\\-help\\fR too."]
    for name, command in sorted(cli.commands.items()):
        context = click.Context(command, info_name=f"fluxcli {name}", help_option_names=["-h", "--help"])
        parts += [f'.SH "FLUXCLI {name.upper()}"', ".B", _escaped(command.get_usage(context).removeprefix("Usage: "))]
        parts += [".PP", *_prose(command.help or "")]
        for heading, records in command.records(context).items():
            parts += [f'.SS "{heading}"'] if records else []
            for option, told in records:
                parts += [".TP", f"\\fB{_escaped(option.strip())}\\fR", _escaped(told)]
        parts += _ending(command.epilog or "")
    parts += [*_ending(cli.epilog or "")]
    return "\n".join(parts) + "\n"


def _prose(text: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n.PP\n".join(_escaped(" ".join(each.split())) for each in paragraphs).split("\n")


def _ending(epilog: str) -> list[str]:
    """Examples, exit codes and environment, each line as it is."""
    parts = []
    for block in epilog.replace("\b\n", "").split("\n\n"):
        title, *lines = block.splitlines()
        parts += [f'.SS "{title.rstrip(":")}"', ".nf", *(_escaped(line.strip()) for line in lines), ".fi"]
    return parts


def _escaped(text: str) -> str:
    """Text in which troff sees no command."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text[:1] in (".", "'") else text


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
