"""What is compiled ahead is there when it is needed."""

from pathlib import Path

import pytest

from fluxcli.engine import ahead
from fluxcli.engine.ahead import Ahead
from fluxcli.engine.runtime.compile_cache import version
from tests.engine.exact import on_gpu


def test_nothing_is_compiled_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.subprocess, "Popen", lambda *args, **options: pytest.fail("started a process"))
    Ahead("cpu", "float32").wait()


def test_a_process_leaves_with_the_one_that_began_it() -> None:
    process = ahead.subprocess.Popen(
        [ahead.sys.executable, "-c", "import time\n"
         "import threading, fluxcli.engine.ahead as ahead\n"
         "threading.Thread(target=ahead._leave_with_parent, daemon=True).start()\n"
         "time.sleep(60)"],
        stdin=ahead.subprocess.PIPE,
    )  # fmt: skip
    process.stdin.close()
    assert process.wait(timeout=50) == 1


@on_gpu
@pytest.mark.parametrize("package", ["flash-attn-4", "quack-kernels"])
def test_every_kernel_of_an_installed_library_is_in_its_cache(package: str, tmp_path: Path, monkeypatch) -> None:
    if version(package) is None:
        pytest.skip(f"{package} is not installed")
    for name in ("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "QUACK_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path))
    made = Ahead("cuda:0", "bfloat16")
    if not made._running:
        pytest.skip("this GPU has but one way")
    made.wait()
    assert not Ahead("cuda:0", "bfloat16")._running, "once is enough"
    folder, least = ("flash-attn-4", len(ahead._FA4)) if "flash" in package else ("quack", len(ahead._QUACK) - 1)
    assert len([path for path in (tmp_path / folder).rglob("*") if path.suffix == ".o"]) >= least
