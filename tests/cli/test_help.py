"""The help: every option is explained, every example can be typed, and docs/cli.md says the same."""

import runpy
import shlex
from pathlib import Path

import click
import pytest

from fluxcli.cli.main import cli

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documented_help_is_the_commands_own() -> None:
    script = runpy.run_path(str(DOCS / "cli.py"))
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == script["text"](), "run make docs"


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_is_explained(name: str) -> None:
    for option in cli.commands[name].params:
        assert not isinstance(option, click.Option) or option.help, option.opts


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_every_example_can_be_typed(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    for directory in ("out", "out-fast"):
        (tmp_path / directory).mkdir()
    monkeypatch.chdir(tmp_path)
    command = cli if name is None else cli.commands[name]
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("fluxcli ")]
    assert lines
    for line in lines:
        _, called, *words = shlex.split(line)
        assert name in (None, called)
        cli.commands[called].make_context(called, words)


def test_names_of_settings_are_taken_in_any_case(inside, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "job.toml").write_text('batch-size = "Auto"\n')
    options = ("--device", "CPU", "--dtype", "Float32", "--attention", "AUTO", "--format", "PNG", "-m", "tiny")
    for words in (("--batch-size", "AUTO"), ("--config", "job.toml")):
        done = inside("batch", "in.jsonl", *options, *words, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr


def test_the_environments_model_is_a_default(inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line wins over --config, and that over the environment."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "job.toml").write_text('model = "from-config"\n')
    monkeypatch.setenv("FLUXCLI_MODEL", "from-environment")
    for words, named in (
        ((), "from-environment"),
        (("--config", "job.toml"), "from-config"),
        (("--config", "job.toml", "-m", "from-line"), "from-line"),
    ):
        done = inside("batch", "in.jsonl", *words, "--dry-run")
        assert done.returncode == 1 and named in done.stderr
    monkeypatch.setenv("FLUXCLI_MODEL", "")
    assert inside("batch", "in.jsonl", "--dry-run").returncode == 0
