"""`fluxcli warmup`: the shapes of an input, or of given sizes, made ready and reported."""

import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxcli.core.config import EngineConfig
from fluxcli.engine.runtime import cache_archive, sealed
from fluxcli.engine.runtime.compile_cache import CompileCache
from fluxcli.models.checkpoints import resolve
from tests.cli.conftest import SMALL, files
from tests.conftest import write_rows


def test_warmup_covers_the_shapes_of_an_input_and_makes_no_images(inside, tmp_path: Path, monkeypatch) -> None:
    rows = [{"prompt": "a"}] * 5 + [{"prompt": "a red circle " * 40, "width": 96}, {"prompt": ""}]
    write_rows(tmp_path / "in.jsonl", rows)
    options = ("in.jsonl", *SMALL, "--batch-size", 4, "--json")
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path / "cache"))
    result = inside("warmup", *options)
    assert result.returncode == 0, result.stderr
    dry = inside("batch", "in.jsonl", *SMALL, "--batch-size", 4, "--dry-run", "--json")
    shapes = [
        {key: row[key] for key in ("batch_size", "height", "width", "text_length")} for row in result.json["shapes"]
    ]
    assert shapes == dry.json["shapes"]
    assert all(row["seconds"] >= 0 for row in result.json["shapes"])
    assert result.json["cache"] == str(tmp_path / "cache")
    assert {name for name in files(tmp_path) if not name.startswith("cache/")} == {"in.jsonl"}


def test_warmup_takes_several_sizes_and_reports_each_on_stderr(inside, tmp_path: Path) -> None:
    options = ("--size", "64x96", "--size", "128x64", "--batch-size", 2, "--text-lengths", "64,128", "-m", "tiny")
    result = inside("warmup", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    for size in ("64x96", "128x64"):
        assert len([line for line in result.stderr.splitlines() if size in line]) == 2
    assert not files(tmp_path)


@pytest.mark.parametrize("options", [("--size", "64"), ("--size", "64x100"), ("in.jsonl", "--size", "64x64")])
def test_sizes_that_cannot_be_meant_are_wrong_usage(inside, tmp_path: Path, options: tuple[str, ...]) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    result = inside("warmup", *options, "-m", "tiny")
    assert result.returncode == 2
    assert "--size" in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.slow
def test_what_was_warmed_up_is_compiled_once_and_comes_from_the_cache_the_next_time(command, tmp_path: Path) -> None:
    options = ("-m", "tiny", "--compile", "--size", "64x64", "--batch-size", 1, "--text-lengths", 64, "--json")
    environment = {"FLUXCLI_CACHE": str(tmp_path / "cache")}
    states = []
    for _ in range(2):
        start = time.perf_counter()
        result = command("warmup", *options, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        states.append([shape["state"] for shape in result.json["shapes"]])
        assert result.json["seconds"] <= time.perf_counter() - start
    assert states == [["cold"], ["cached"]]
    assert any((tmp_path / "cache").rglob("*"))


# Caches that travel. What a compiler would have left is put there by hand, except in the slow test.

SHARED = ("flash-attn-4", "quack")  # packages that keep their kernels for all architectures together
ONE = ("-m", "tiny", "--size", "64x64", "--batch-size", 1, "--text-lengths", 64)


def cache(home: Path, monkeypatch: pytest.MonkeyPatch, dtype: str = "float32") -> CompileCache:
    monkeypatch.setenv("FLUXCLI_CACHE", str(home))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # restored afterwards
    return CompileCache(resolve("tiny"), EngineConfig("cpu", dtype, True))


def fill(made: CompileCache) -> None:
    """One kernel in Triton's layout: its parts, and the file that lists them by absolute path; and a choice."""
    kernel = made.directory / "triton" / "KEY"
    kernel.mkdir(parents=True)
    (kernel / "gelu.cubin").write_bytes(bytes(range(256)))
    listed = {"child_paths": {"gelu.cubin": str(kernel / "gelu.cubin")}}
    (kernel / "__grp__gelu.json").write_text(json.dumps(listed))
    for package in SHARED:
        (made.directory.parents[2] / package).mkdir()
        (made.directory.parents[2] / package / "forward.o").write_bytes(package.encode())
    made.add("choices.json", {"1x128x2x32": "sdpa", "2x128x2x32": "sdpa"})


@pytest.fixture
def key(tmp_path: Path) -> Path:
    assert sealed.make_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def exported(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    there = cache(tmp_path / "there", monkeypatch)
    fill(there)
    size = cache_archive.export(there, tmp_path / "cache.zip", sealed.read_key(key))
    assert size == (tmp_path / "cache.zip").stat().st_size
    return tmp_path / "cache.zip"


def test_a_cache_arrives_whole_elsewhere(exported: Path, key: Path, inside, tmp_path: Path, monkeypatch) -> None:
    here = cache(tmp_path / "here", monkeypatch)
    here.add("choices.json", {"2x128x2x32": "fa4", "4x128x2x32": "fa4"})
    done = inside("warmup", "-m", "tiny", "--import", exported, "--key", key, "--json")
    assert done.returncode == 0, done.stderr
    assert done.json["imported"] == 5
    kernel = here.directory / "triton" / "KEY"
    assert (kernel / "gelu.cubin").read_bytes() == bytes(range(256))
    listed = json.loads((kernel / "__grp__gelu.json").read_text())
    assert listed == {"child_paths": {"gelu.cubin": str(kernel / "gelu.cubin")}}
    expected = {"1x128x2x32": "sdpa", "2x128x2x32": "sdpa", "4x128x2x32": "fa4"}
    assert here.read("choices.json") == expected
    assert all(files(tmp_path / "here")[f"{package}/forward.o"] == package.encode() for package in SHARED)
    assert len([name for name in files(tmp_path / "here") if not name.startswith("locks/")]) == 5


def test_without_a_key_what_was_measured_travels_and_no_code(inside, tmp_path: Path, monkeypatch) -> None:
    there = cache(tmp_path / "there", monkeypatch)
    fill(there)
    done = inside("warmup", *ONE, "--export", "cache.zip")
    assert done.returncode == 0, done.stderr
    assert "without --key the exported file carries what was measured, and no compiled code" in done.stderr
    here = cache(tmp_path / "here", monkeypatch)
    done = inside("warmup", "-m", "tiny", "--import", "cache.zip", "--json")
    assert done.returncode == 0, done.stderr
    assert done.json["imported"] == 1
    assert here.read("choices.json")["1x128x2x32"] == "sdpa"
    assert [path.name for path in here.directory.rglob("*") if path.is_file()] == ["choices.json"]


def test_compiled_code_comes_in_by_the_key_that_signed_it_alone(exported: Path, inside, tmp_path: Path) -> None:
    other = tmp_path / "other"
    sealed.make_key(other)
    for options, reason in (((), "give --key FILE"), (("--key", other), "its signature is not this key's")):
        done = inside("warmup", "-m", "tiny", "--import", exported, *options)
        assert done.returncode == 1
        assert f"--import {exported}" in done.stderr and reason in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_an_export_makes_the_key_that_is_missing_for_this_user_alone(inside, tmp_path: Path, monkeypatch) -> None:
    fill(cache(tmp_path / "there", monkeypatch))
    for name, told in (("one.zip", True), ("two.zip", False)):
        done = inside("warmup", *ONE, "--export", name, "--key", "key")
        assert done.returncode == 0, done.stderr
        assert ("key: a new key" in done.stderr) == told
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    cache(tmp_path / "here", monkeypatch)
    for name in ("one.zip", "two.zip"):
        assert inside("warmup", "-m", "tiny", "--import", name, "--key", "key").returncode == 0


KEYS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "missing": (lambda key: key.unlink(), 1, "no such file"),
    "short": (lambda key: key.write_text("secret\n"), 1, "shorter than 16 bytes"),
    "a FIFO": (lambda key: (key.unlink(), os.mkfifo(key)), 1, "no such file"),
    "read by others": (lambda key: key.chmod(0o644), 0, "Warning: --key"),
    "written by others": (lambda key: key.chmod(0o666), 1, "can be written by other users"),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_key_that_proves_nothing_is_told(case: str, exported: Path, key: Path, inside, tmp_path, monkeypatch) -> None:
    harm, code, reason = KEYS[case]
    harm(key)
    cache(tmp_path / "here", monkeypatch)
    done = inside("warmup", "-m", "tiny", "--import", exported, "--key", key)
    assert done.returncode == code
    assert f"--key {key}" in done.stderr and reason in done.stderr


def test_a_key_alone_is_wrong_usage(inside, key: Path) -> None:
    done = inside("warmup", *ONE, "--key", key)
    assert done.returncode == 2
    assert "--export or --import" in done.stderr


def test_a_file_that_exists_is_not_overwritten(exported: Path, inside) -> None:
    before = exported.read_bytes()
    done = inside("warmup", *ONE, "--export", exported)
    assert done.returncode == 1
    assert "loading" not in done.stderr
    assert f"{exported}: exists already" in done.stderr
    assert exported.read_bytes() == before


def test_a_place_that_cannot_be_written_is_told_before_loading(inside, tmp_path: Path) -> None:
    done = inside("warmup", *ONE, "--export", tmp_path / "nowhere" / "cache.zip")
    assert done.returncode == 1
    assert "loading" not in done.stderr
    assert "nowhere is not a directory" in done.stderr


def test_nothing_compiled_is_nothing_to_carry(inside, tmp_path: Path, monkeypatch) -> None:
    cache(tmp_path / "empty", monkeypatch)
    done = inside("warmup", *ONE, "--export", "cache.zip")
    assert done.returncode == 1
    assert "nothing to carry" in done.stderr
    done = inside("warmup", *ONE, "--export", "cache.zip", "--key", "key")
    assert done.returncode == 1
    assert "nothing was compiled" in done.stderr
    assert files(tmp_path).keys() == {"key"}


def rewritten(file: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        contents = {each: archive.read(each) for each in archive.namelist()}
    contents[name] = change(contents.get(name, b""))
    with zipfile.ZipFile(file, "w") as archive:
        for each, data in contents.items():
            archive.writestr(each, data)


def elsewhere(file: Path, **header: object) -> None:
    rewritten(file, "header.json", lambda data: json.dumps({**json.loads(data), **header}).encode())


REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another torch": (lambda file: elsewhere(file, torch="1.0"), ("torch 1.0 there and",)),
    "another gpu": (lambda file: elsewhere(file, gpu="NVIDIA H100"), ("gpu NVIDIA H100 there and None here",)),
    "another cuda": (lambda file: elsewhere(file, cuda="12.9"), ("cuda 12.9 there and None here",)),
    "another model": (lambda file: elsewhere(file, architecture="flux-0"), ("architecture flux-0 there",)),
    "another fluxcli": (lambda file: elsewhere(file, fluxcli="0.0"), ("fluxcli 0.0 there",)),
    "no zip": (lambda file: file.write_bytes(b"x" * 100), ("damaged, or not a file that warmup --export wrote",)),
    "half of one": (
        lambda file: file.write_bytes(file.read_bytes()[:300]),
        ("damaged, or not a file that warmup --export wrote",),
    ),
    "some other zip": (lambda file: zipfile.ZipFile(file, "w").close(), ("damaged, or not a file",)),
    "a path that leads out": (
        lambda file: rewritten(file, "files/../../x", lambda data: b"x"),
        ("has no place",),
    ),
    "no file": (lambda file: file.unlink(), ("No such file",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_from_elsewhere_is_refused_with_the_reason(
    case: str, exported: Path, key: Path, inside, tmp_path: Path, monkeypatch
) -> None:
    harm, reasons = REFUSED[case]
    harm(exported)
    cache(tmp_path / "here", monkeypatch)
    done = inside("warmup", *ONE, "--import", exported, "--key", key)
    assert done.returncode == 1
    assert "loading" not in done.stderr
    assert f"--import {exported}" in done.stderr
    for reason in reasons:
        assert reason in done.stderr
    assert not files(tmp_path / "here")


def test_another_dtype_is_refused(exported: Path, inside) -> None:
    done = inside("warmup", *ONE, "--dtype", "bfloat16", "--import", exported)
    assert done.returncode == 1
    assert "dtype float32 there and bfloat16 here" in done.stderr


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_after_an_import_nothing_is_compiled(device: str, command, tmp_path: Path) -> None:
    visible = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}

    def warmup(home: str, *options: object) -> list[str]:
        environment = {"FLUXCLI_CACHE": str(tmp_path / home), **visible}
        options = (*ONE, "--compile", "--device", device, "--json", *options)
        result = command("warmup", *options, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        return [shape["state"] for shape in result.json["shapes"]]

    def built(home: str) -> set[str]:
        return {name for name in files(tmp_path / home) if name.endswith((".so", ".cubin"))}

    assert warmup("there", "--export", "cache.zip", "--key", "key") == ["cold"]
    (tmp_path / "there").rename(tmp_path / "gone")
    assert warmup("here", "--import", "cache.zip", "--key", "key") == ["cached"]
    assert built("here") == built("gone") != set()
