"""What the documents say is there is there."""

import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from fluxcli import __version__
from fluxcli.cli.main import cli
from fluxcli.engine.runtime import device

ROOT = Path(__file__).parents[1]
DOCS = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md"))]


def test_architecture_names_every_room_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\S+)/` \|", text, re.M))
    rooms = {path.parent.relative_to(ROOT / "fluxcli").as_posix() for path in ROOT.glob("fluxcli/*/**/*.py")}
    assert named == rooms


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    inside = re.findall(r"`((?:tests|jobs|docs|fluxcli|core|cli|models|job|engine|bench)/[\w./-]+\.\w+)`", text)
    links = [path.parent / link for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)]
    assert all(target.exists() for target in links), links
    missing = [name for name in inside if not (ROOT / name).exists() and not (ROOT / "fluxcli" / name).exists()]
    assert not missing


SCRIPTS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script[:40])
def test_a_recipe_is_shell_and_its_commands_can_be_meant(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for name, words in re.findall(r"fluxcli ([a-z]+)((?: (?![|&;])\S+?)+)(?=;| [|&]|\n|$)", script):
        command = cli.commands[name]
        with click.Context(command, help_option_names=["-h", "--help"]) as context:  # which the command keeps
            _, rest, _ = command.make_parser(context).parse_args(shlex.split(words))
        assert rest == []


def test_the_recipes_have_scripts() -> None:
    assert sum("fluxcli " in script for script in SCRIPTS) >= 5


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_headings_that_a_link_names_are_there(path: Path) -> None:
    for link, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", path.read_text(encoding="utf-8")):
        text = (path.parent / link if link else path).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.M)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_package_page_links_to_addresses_alone() -> None:
    """It is shown where there is no repository around it."""
    page = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["readme"]
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)


def test_the_manual_page_is_the_help_and_troff_has_nothing_to_say_of_it() -> None:
    page = ROOT / "docs" / "fluxcli.1"
    script = runpy.run_path(str(page.with_name("man.py")))
    assert page.read_text(encoding="utf-8") == script["text"](), "run make docs"
    if groff := shutil.which("groff"):
        words = [groff, "-man", "-Tutf8", "-ww", str(page)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        assert "every row of INPUT becomes an image" in done.stdout


def test_every_torch_that_pip_may_install_has_a_job_of_its_own() -> None:
    (first, last), minors = device.TORCH, set[str]()
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    for listed in re.findall(r"^ +torch: \[(.+)\]$", workflow, re.M):
        minors |= set(re.findall(r"[\d.]+", listed))
    assert first[0] == last[0] and minors == {f"{first[0]}.{minor}" for minor in range(first[1], last[1] + 1)}
    assert f"torch>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_releases_are_named_alike() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
