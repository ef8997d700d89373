"""The help: every option is explained, every example can be typed, and docs/cli.md says the same."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from fluxcli.cli.help import HEADINGS
from fluxcli.cli.main import cli
from fluxcli.cli.types import Gpus

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documented_help_is_the_commands_own() -> None:
    script = runpy.run_path(str(DOCS / "cli.py"))
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == script["text"](), "run make docs"


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_is_explained(name: str) -> None:
    for option in cli.commands[name].params:
        assert not isinstance(option, click.Option) or option.help, option.opts


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_stands_under_a_heading(name: str) -> None:
    common = {"as_json", "verbose", "quiet"}
    under = {option for names in HEADINGS.values() for option in names.split()}
    own = {str(each.name) for each in cli.commands[name].params if isinstance(each, click.Option)}
    assert own - common <= under


def test_no_heading_names_an_option_that_is_not_there() -> None:
    there = {str(each.name) for command in cli.commands.values() for each in command.params}
    assert {option for names in HEADINGS.values() for option in names.split()} <= there


@pytest.mark.parametrize("name", [None, *cli.commands])
@pytest.mark.parametrize("columns", [80, 200])
def test_help_fits_the_terminal_and_ends_with_examples_and_exit_codes(
    inside, monkeypatch: pytest.MonkeyPatch, name: str | None, columns: int
) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *args: os.terminal_size((columns, 24)))
    done = CliRunner().invoke(cli, [*([name] if name else []), "--help"], prog_name="fluxcli")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
    assert "  Examples:" in lines and "  Exit codes:" in lines


def test_the_group_tells_each_command_in_a_whole_sentence() -> None:
    lines = CliRunner().invoke(cli, ["--help"]).stdout.splitlines()
    listed = lines[lines.index("Commands:") + 1 :][: len(cli.commands)]
    assert [line.split()[0] for line in listed] == sorted(cli.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_the_groups_help_tells_the_environment() -> None:
    text = CliRunner().invoke(cli, ["--help"]).stdout
    for variable in ("FLUXCLI_MODEL", "FLUXCLI_CACHE", "HF_TOKEN"):
        assert variable in text
    assert "[env var: FLUXCLI_MODEL]" in CliRunner().invoke(cli, ["gen", "--help"]).stdout


def test_warmup_has_no_option_that_changes_no_shape() -> None:
    for option in ("--seed", "--guidance"):
        done = CliRunner().invoke(cli, ["warmup", option, "1"])
        assert done.exit_code == 2 and option in done.stderr


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["gen", "--device"], "c", ["cpu", "cuda", "cuda:0", "cuda:1"]),
        (["batch", "--model"], "random:", ["random:flux-dev", "random:flux-schnell"]),
        (["gen", "-m"], "black", ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"]),
        (["batch", "--input-format"], "j", ["jsonl"]),
    ],
)
def test_a_shell_completes_models_and_devices(
    words: list[str], incomplete: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpu in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / gpu).mkdir()
    monkeypatch.setattr("fluxcli.cli.types._GPUS", str(tmp_path))
    found = ShellComplete(cli, {}, "fluxcli", "_FLUXCLI_COMPLETE").get_completions(words, incomplete)
    assert [each.value for each in found] == expected


def test_a_shell_completes_a_models_directory() -> None:
    (found,) = ShellComplete(cli, {}, "fluxcli", "_FLUXCLI_COMPLETE").get_completions(["gen", "-m"], "./mod")
    assert (found.value, found.type) == ("./mod", "file")


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_every_example_can_be_typed(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name_of in ("prompts.jsonl", "prompts.csv"):
        (tmp_path / name_of).write_text('{"prompt": "a"}\n')
    for directory in ("out", "out-fast"):
        (tmp_path / directory).mkdir()
    monkeypatch.chdir(tmp_path)
    command = cli if name is None else cli.commands[name]
    lines = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("fluxcli ")]
    assert len(lines) == 3
    for line in lines:
        _, called, *words = shlex.split(line)
        assert name in (None, called)
        cli.commands[called].make_context(called, words)


def test_names_of_settings_are_taken_in_any_case(inside, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "job.toml").write_text('batch-size = "Auto"\n')
    options = ("--device", "CPU", "--dtype", "Float32", "--attention", "AUTO", "--format", "PNG", "-m", "tiny")
    for words in (("--batch-size", "AUTO"), ("--config", "job.toml"), ("--input-format", "JSONL")):
        done = inside("batch", "in.jsonl", *options, *words, "--dry-run", "--json")
        assert done.returncode == 0, done.stderr


def test_windows_is_told_in_a_line_where_fluxcli_runs() -> None:
    code = "import sys\nfrom fluxcli.__main__ import main\nsys.platform = 'win32'\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: fluxcli runs on Linux, macOS and WSL: on Windows install it inside WSL\n"


def test_all_gpus_may_be_said_in_any_case() -> None:
    assert Gpus().convert("ALL", None, None) == "all"


def test_demo_is_an_input_unless_there_is_a_file_of_that_name(inside, tmp_path: Path) -> None:
    words = ("batch", "demo", "-m", "tiny", "--dry-run", "--json")
    done = inside(*words)
    assert done.returncode == 0, done.stderr
    assert done.json["images"] == 16 and done.json["directory"] == "out/demo"
    (tmp_path / "demo").mkdir()
    assert inside(*words).json["images"] == 16
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text('{"prompt": "a"}\n')
    assert inside(*words, "--input-format", "jsonl").json["images"] == 1


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
