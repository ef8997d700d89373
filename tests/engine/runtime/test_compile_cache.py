"""What counts as compiled: Triton's kernels, which a process without a GPU can compile for one, and the caches that
they come from, which are this user's alone."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from fluxcli.core.config import EngineConfig
from fluxcli.core.errors import CacheError
from fluxcli.engine.runtime.compile_cache import CompileCache
from fluxcli.models.checkpoints import resolve

COMPILE = """
import json, os
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from fluxcli.models.checkpoints import resolve
from fluxcli.core.config import EngineConfig
from fluxcli.engine.runtime import cache_archive, compile_cache

made = compile_cache.CompileCache(resolve("tiny"), EngineConfig("cpu", "float32", True))
compile_cache._listen_to_triton()
if os.environ.get("IMPORT"):
    cache_archive.import_(made, Path(os.environ["IMPORT"]), b"key" * 8)

@triton.jit
def double(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) * 2)

for block in (64, 128):
    source = triton.compiler.ASTSource(double, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": block})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
if os.environ.get("EXPORT"):
    cache_archive.export(made, Path(os.environ["EXPORT"]), b"key" * 8)
print(json.dumps(compile_cache.compile_counts()))
"""


def compiled(tmp_path: Path, home: str, **variables: object) -> dict[str, int]:
    script = tmp_path / "kernels.py"  # Triton reads a kernel's source from its file
    script.write_text(COMPILE)
    environment = {**os.environ, "FLUXCLI_CACHE": str(tmp_path / home), **{k: str(v) for k, v in variables.items()}}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not find_spec("triton"), reason="there is no Triton here")
def test_kernels_are_counted_and_found_again_in_another_process_and_after_an_import(tmp_path: Path) -> None:
    archive = tmp_path / "cache.zip"
    assert compiled(tmp_path, "there", EXPORT=archive) == {"graphs": 2, "misses": 2}
    assert compiled(tmp_path, "there") == {"graphs": 2}
    (tmp_path / "there").rename(tmp_path / "gone")
    assert compiled(tmp_path, "here", IMPORT=archive) == {"graphs": 2}


def made(compile: bool = True) -> CompileCache:
    return CompileCache(resolve("tiny"), EngineConfig("cpu", "float32", compile))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path / "cache"))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # restored afterwards
    return tmp_path / "cache"


OPEN: dict[str, Callable[[Path], object]] = {
    "the cache": lambda home: home.chmod(0o777),
    "a directory above": lambda home: home.parent.chmod(0o777),
    "a directory in it": lambda home: (made().directory / "inductor").chmod(0o777),
    "that of a package": lambda home: (home / "quack").mkdir() or (home / "quack").chmod(0o777),
}


@pytest.mark.parametrize("case", OPEN)
def test_a_cache_that_others_can_write_is_not_read(case: str, home: Path) -> None:
    (made().directory / "inductor").mkdir(parents=True)
    OPEN[case](home)
    with pytest.raises(CacheError, match=r"can be written by other users: chmod go-w, or set") as told:
        made()
    assert str(home) in str(told.value)
    eager = made(compile=False)  # of which nothing is read until it is asked
    with pytest.raises(CacheError):
        eager.read("choices.json")
    with pytest.raises(CacheError):
        eager.add("choices.json", {"a": "sdpa"})


def test_a_cache_of_somebody_else_is_not_read(home: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a directory away")
    made()
    os.chown(home, 12345, -1)
    with pytest.raises(CacheError, match="belongs to another user"):
        made()


def test_a_new_cache_is_closed_to_others(home: Path) -> None:
    made()
    assert home.stat().st_mode & 0o777 == 0o700


def test_where_no_cache_can_be_made_that_is_told(home: Path) -> None:
    home.write_bytes(b"")
    with pytest.raises(CacheError, match=r"cannot be made: .*; set FLUXCLI_CACHE"):
        made()


def test_of_several_processes_one_settles_a_choice_and_none_loses_anothers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path / "cache"))
    cache, found = CompileCache(resolve("tiny"), EngineConfig("cpu", "float32", True)), tmp_path / "found"
    cache.add("choices.json", {"shared": "no longer there"})

    def settle(number: int) -> None:
        def find() -> str:
            with found.open("a") as file:
                file.write(f"{number}\n")
            time.sleep(0.1)
            return f"way {number}"

        for problem in ("shared", f"own {number}"):
            way = cache.settled("choices.json", problem, lambda way: str(way).startswith("way"), find)
            (tmp_path / f"{problem} {number}").write_text(way)

    children = []
    for number in range(4):
        if (child := os.fork()) == 0:
            try:
                settle(number)
                os._exit(0)
            except BaseException:
                os._exit(99)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(found.read_text().split()) == 1 + 4, "the shared one was found twice"
    settled = cache.read("choices.json")
    assert settled == {"shared": settled["shared"], **{f"own {number}": f"way {number}" for number in range(4)}}
    assert {(tmp_path / f"shared {number}").read_text() for number in range(4)} == {settled["shared"]}
