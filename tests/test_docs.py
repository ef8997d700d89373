"""What the documents say is there is there."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from fluxcli.cli.main import cli

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def test_architecture_names_every_room_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\S+)/` \|", text, re.M))
    rooms = {path.parent.relative_to(ROOT / "fluxcli").as_posix() for path in ROOT.glob("fluxcli/*/**/*.py")}
    assert named == rooms


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    inside = re.findall(r"`((?:tests|jobs|docs|fluxcli|core|cli|models|job|engine|bench)/[\w./-]+\.\w+)`", text)
    links = [path.parent / link for link in re.findall(r"\]\(([\w./-]+)\)", text)]
    assert all(target.exists() for target in links), links
    missing = [name for name in inside if not (ROOT / name).exists() and not (ROOT / "fluxcli" / name).exists()]
    assert not missing


SCRIPTS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script[:40])
def test_a_recipe_is_shell_and_its_commands_can_be_meant(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for name, words in re.findall(r"fluxcli ([a-z]+)((?: (?![|&;])\S+?)+)(?=;| [|&]|\n|$)", script):
        command = cli.commands[name]
        with click.Context(command) as context:
            _, rest, _ = command.make_parser(context).parse_args(shlex.split(words))
        assert rest == []


def test_the_recipes_have_scripts() -> None:
    assert sum("fluxcli " in script for script in SCRIPTS) >= 5
