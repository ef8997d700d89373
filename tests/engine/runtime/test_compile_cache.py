"""What counts as compiled: Triton's kernels, which a process without a GPU can compile for one, and the caches that
they come from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, os, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from fluxcli.models.checkpoints import resolve
from fluxcli.core.config import EngineConfig
from fluxcli.engine.runtime import cache_archive, compile_cache

made = compile_cache.CompileCache(resolve("tiny"), EngineConfig("cpu", "float32", True))
compile_cache._listen_to_triton()
if os.environ.get("IMPORT"):
    cache_archive.import_(made, __import__("pathlib").Path(os.environ["IMPORT"]))

@triton.jit
def double(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) * 2)

for block in (64, 128):
    source = triton.compiler.ASTSource(double, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": block})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
if os.environ.get("EXPORT"):
    cache_archive.export(made, __import__("pathlib").Path(os.environ["EXPORT"]))
print(json.dumps(compile_cache.compile_counts()))
"""


def compiled(tmp_path: Path, home: str, **variables: object) -> dict[str, int]:
    script = tmp_path / "kernels.py"  # Triton reads a kernel's source from its file
    script.write_text(COMPILE)
    environment = {**os.environ, "FLUXCLI_CACHE": str(tmp_path / home), **{k: str(v) for k, v in variables.items()}}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_are_counted_and_found_again_in_another_process_and_after_an_import(tmp_path: Path) -> None:
    archive = tmp_path / "cache.zip"
    assert compiled(tmp_path, "there", EXPORT=archive) == {"graphs": 2, "misses": 2}
    assert compiled(tmp_path, "there") == {"graphs": 2}
    (tmp_path / "there").rename(tmp_path / "gone")
    assert compiled(tmp_path, "here", IMPORT=archive) == {"graphs": 2}
