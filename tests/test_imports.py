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
# Every room, each above all that it may import. The two wings are apart, and above what both stand on.
GROUND = ("core", "models.flux1", "models")
JOB = (
    "job.output",
    "job.plan",
    "job.input",
    "job.run",
    "job.fleet",
    "job.report",
    "job.single",
    "job.replay",
    "job.job",
)
ENGINE = (
    "engine.denoise", "engine.runtime", "engine.flight", "engine.attention", "engine.matmul",
    "engine.layers", "engine.nets", "engine.true_cfg", "engine.step_cache", "engine.weights", "engine.text",
    "engine.vae", "engine.lpips", "engine.memory",
    "engine.engine",
)  # fmt: skip
TOP = ("worker", "api", "bench", "cli", "__main__")
ROOMS = (*GROUND, *JOB, *ENGINE, *TOP)


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


def room(module: str) -> str:
    inner = module.removeprefix("fluxcli.")
    known = [name for name in ROOMS if inner == name or inner.startswith(f"{name}.")]
    assert known, f"{module} has no place in the house"
    return max(known, key=len)


def outside(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(MODULES[module])} - {"fluxcli"}


WINGS = {"fluxcli", "fluxcli.job", "fluxcli.engine"}  # their first lines alone: nothing stands in them


@pytest.mark.parametrize("module", [name for name in MODULES if name not in WINGS])
def test_imports_point_down(module: str) -> None:
    own = room(module)
    for other in imports(MODULES[module]) - WINGS:
        if other.partition(".")[0] == "fluxcli" and (theirs := room(other)) != own:
            assert ROOMS.index(theirs) < ROOMS.index(own), f"{module} imports {other}"
            apart = (own in JOB and theirs in ENGINE) or (own in ENGINE and theirs in JOB)
            assert not apart, f"{module} imports {other}, of the other wing"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """In functions neither: who reads one file should not have to read it again to understand what it uses."""
    inside = {name: imports(path) & MODULES.keys() - WINGS for name, path in MODULES.items() if name not in WINGS}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in inside[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in inside:
        visit(module, ())


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


def test_only_one_process_of_a_job_imports_ray() -> None:
    """It takes over what belongs to its process, and unpickles what it hears."""
    assert [name for name in MODULES if "ray" in outside(name)] == ["fluxcli.job.fleet.cluster.driver"]
    others = {name for name in MODULES if "fluxcli.job.fleet.cluster.driver" in imports(MODULES[name])}
    assert not others


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
