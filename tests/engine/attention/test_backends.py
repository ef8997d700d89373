"""Which attention runs, and what is said where one cannot."""

from types import SimpleNamespace

import pytest
import torch

from fluxcli.core.errors import DeviceError
from fluxcli.engine.attention import backends
from fluxcli.engine.attention.backends import Attention, check, sdpa
from fluxcli.engine.runtime.tuner import Tuner
from tests.engine.exact import TOLERANCE, error, exact, on_gpu

SHAPE = (1, 8, 2, 16)
HALF = torch.bfloat16


def installed(monkeypatch: pytest.MonkeyPatch, **modules: object) -> None:
    """As on a GPU that is no Hopper, with these modules and no other flash attention; an exception is raised."""

    def import_module(name: str) -> object:
        module = modules.get(name.replace(".", "_"))
        if isinstance(module, Exception):
            raise module
        if module is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return module

    monkeypatch.setattr(backends, "importlib", SimpleNamespace(import_module=import_module))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def flash(q, k, v):
    return sdpa(torch.stack((q, k, v), dim=2))


def refusing(q, k, v):
    raise RuntimeError("head dim 16 is not supported\nat some place")


def test_a_shape_that_the_chosen_backend_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, flash_attn=SimpleNamespace(flash_attn_func=refusing))
    made = Attention("fa2", Tuner("cuda:0"), "cuda:0", HALF)
    with pytest.raises(DeviceError, match=r"^--attention fa2: .*: head dim 16 is not supported; use --attention auto$"):
        made.require(*SHAPE, "cpu", HALF)


def test_auto_leaves_it_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, flash_attn=SimpleNamespace(flash_attn_func=refusing))
    tuner = Tuner("cuda:0")
    made = Attention("auto", tuner, "cuda:0", HALF)
    qkv = torch.randn(1, 8, 3, 2, 16).bfloat16()
    tuner.table[made._problem(qkv)] = "fa2"
    with pytest.warns(UserWarning, match="fa2 .* is left out: head dim 16"):
        assert torch.equal(made(qkv), sdpa(qkv))
    made.require(*SHAPE, "cpu", HALF)


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_memory_that_ran_out_is_not_held_against_a_backend(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    def out(q, k, v):
        raise fault("out of memory")

    installed(monkeypatch, flash_attn=SimpleNamespace(flash_attn_func=out))
    with pytest.raises(fault):
        Attention("fa2", Tuner("cuda:0"), "cuda:0", HALF).require(*SHAPE, "cpu", HALF)


@pytest.mark.parametrize("error", [ImportError("libfa.so: no such file"), TypeError("a decorator\nfails")], ids=type)
def test_a_package_that_is_there_and_cannot_be_imported_is_told(error, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, flash_attn=error)
    monkeypatch.setattr(backends, "version", {"flash-attn": "2.8"}.get)
    reason = str(error).partition("\n")[0]
    with pytest.warns(UserWarning, match=f"fa2 attention is left out: .*{reason}"):
        assert list(Attention("auto", Tuner("cuda:0"), "cuda:0", HALF)._ways) == ["sdpa"]
    with pytest.raises(DeviceError, match=f"--attention fa2: .*{reason}.*; use --attention auto"):
        Attention("fa2", Tuner("cuda:0"), "cuda:0", HALF)


def test_packages_that_are_not_installed_are_not_told(monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
    installed(monkeypatch)
    monkeypatch.setattr(backends, "version", {}.get)
    assert list(Attention("auto", Tuner("cuda:0"), "cuda:0", HALF)._ways) == ["sdpa"]
    assert not recwarn.list


def test_a_choice_is_made_anew_where_other_backends_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that lacked one must not decide for those that have it."""
    qkv, names = torch.randn(1, 8, 3, 2, 16).bfloat16(), set()
    monkeypatch.setattr(backends, "version", {}.get)
    for modules in ({}, {"flash_attn": SimpleNamespace(flash_attn_func=flash)}):
        installed(monkeypatch, **modules)
        names.add(Attention("auto", Tuner("cuda:0"), "cuda:0", HALF)._problem(qkv))
    monkeypatch.setattr(backends.metadata, "version", lambda package: "2")
    names.add(Attention("auto", Tuner("cuda:0"), "cuda:0", HALF)._problem(qkv))
    assert len(names) == 3


@pytest.mark.parametrize("backend", ["cudnn", "fa4", "fa3", "fa2"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(backend: str) -> None:
    with pytest.raises(DeviceError, match=f"--attention {backend}: it needs a CUDA GPU; use --attention auto"):
        check(backend, "cpu", torch.float32)


def test_nothing_is_refused_that_runs_on_a_cpu() -> None:
    check("auto", "cpu", torch.float32)
    check("sdpa", "cpu", torch.float32)


@on_gpu
@pytest.mark.parametrize("strided", [False, True])
def test_every_way_is_right(strided: bool) -> None:
    torch.manual_seed(0)
    made = Attention("auto", Tuner("cuda:0"), "cuda:0", HALF)
    qkv = torch.randn(2, 700, 7, 4, 128, device="cuda").bfloat16()[:, :, :3]
    qkv = qkv if strided else qkv.contiguous()
    expected = sdpa(exact(qkv))
    ways = made.ways(qkv)
    assert len(ways) > 1
    for name, way in ways.items():
        assert error(way(), expected) < 2 * TOLERANCE[HALF], name
