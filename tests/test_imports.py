"""The house: imports point down, heavy ones only where they belong, and the command line answers before any of them."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fluxcli

ROOT = Path(fluxcli.__file__).parent
FLOORS = {
    "fluxcli": 0, "fluxcli.core": 1, "fluxcli.models": 2,
    "fluxcli.job": 3, "fluxcli.engine": 3,
    "fluxcli.bench": 4, "fluxcli.api": 5, "fluxcli.cli": 5, "fluxcli.__main__": 6,
}  # fmt: skip

API_OF = {"fluxcli": {"fluxcli.api"}}  # named for type checkers, imported when asked for


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Every module named by an import statement, wherever it stands, under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide which floor they reach"
            assert node.module
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found.update(inside or {node.module})
    return found


def floor(module: str) -> int:
    known = [name for name in FLOORS if module == name or (name != "fluxcli" and module.startswith(f"{name}."))]
    assert known, f"{module} has no place in the house"
    return FLOORS[max(known, key=len)]


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def outside(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(MODULES[module])} - {"fluxcli"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for other in imports(MODULES[module]) - API_OF.get(module, set()):
        if other.partition(".")[0] == "fluxcli" and room(other) != room(module):
            assert floor(other) < floor(module) or other == "fluxcli", f"{module} imports {other}"


@pytest.mark.parametrize("module", ["fluxcli", *(name for name in MODULES if name.startswith("fluxcli.core"))])
def test_the_ground_floor_imports_the_standard_library_only(module: str) -> None:
    assert outside(module) <= {*sys.stdlib_module_names, "numpy"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("fluxcli.job")])
def test_the_job_knows_neither_torch_nor_the_engine(module: str) -> None:
    assert not outside(module) & {"torch", "diffusers", "transformers", "safetensors", "click"}
    assert not {name for name in imports(MODULES[module]) if name.startswith("fluxcli.engine")}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("fluxcli.engine")])
def test_the_engine_knows_neither_jobs_nor_the_command_line(module: str) -> None:
    assert not outside(module) & {"click", "tqdm", "PIL", "jsonlines"}
    assert not {name for name in imports(MODULES[module]) if name.startswith("fluxcli.job")}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("fluxcli.bench")])
def test_the_bench_knows_neither_jobs_nor_the_command_line(module: str) -> None:
    assert not outside(module) & {"click", "tqdm", "PIL", "jsonlines"}
    assert not {name for name in imports(MODULES[module]) if name.startswith("fluxcli.job")}


def test_only_one_module_reads_weight_files() -> None:
    """For their values; and one, without torch, for their heads."""
    assert [name for name in MODULES if "safetensors" in outside(name)] == ["fluxcli.engine.weights.sources"]
    heads = [name for name, path in MODULES.items() if '"data_offsets"' in path.read_text(encoding="utf-8")]
    assert heads == ["fluxcli.models.headers"]


@pytest.mark.parametrize("line", ["--help", "--version", "batch --help", "gen --help", "warmup --help", "bench --help"])
def test_help_and_version_import_no_torch(line: str) -> None:
    code = (
        "import sys\nfrom fluxcli.cli.main import cli\n"
        f"try: cli.main({line.split()}, prog_name='fluxcli')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'PIL', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fluxcli" in done.stdout


def test_the_package_imports_nothing_until_it_is_asked() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport fluxcli\n"
        "ours = {name for name in sys.modules if name.startswith('fluxcli')}\n"
        "assert ours == {'fluxcli'}, ours\n"
        "foreign = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert foreign == {'fluxcli'}, foreign\n"
        "fluxcli.load, fluxcli.Job, fluxcli.FluxcliError\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'PIL', 'click', 'tqdm'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_answer_in_under_half_a_second(option: str) -> None:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "fluxcli", option], capture_output=True, env=os.environ)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert min(times) < 0.5, times
