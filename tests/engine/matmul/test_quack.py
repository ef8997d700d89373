"""quack-kernels: which matmuls it is offered, and what becomes of a release that does not go with this machine."""

import sys
import warnings
from types import ModuleType

import pytest
import torch

from fluxcli.engine.matmul.gemm import Gemm
from fluxcli.engine.matmul.quack import Quack

ONE = ["quack 128x192"]


@pytest.fixture
def quack() -> Quack:
    return Quack(None, lambda **settings: settings, "quack 1")


def halves(outputs: int = 192, x: torch.Tensor | None = None) -> Gemm:
    x = torch.randn(2, 96, 64).bfloat16() if x is None else x
    return Gemm(x, torch.randn(outputs, 64).to(x.dtype), torch.randn(outputs).to(x.dtype))


def test_what_lies_as_the_copy_engine_wants_it_is_offered(quack: Quack) -> None:
    assert list(quack.ways([halves()])) == ONE
    assert list(quack.ways([halves(x=torch.randn(2, 128, 64).bfloat16()[:, 32:])])) == ONE


def test_numbers_in_8_bits_have_a_tile_of_their_own(quack: Quack) -> None:
    x, weight = (torch.randn(*shape).to(torch.float8_e4m3fn) for shape in ((2, 96, 64), (192, 64)))
    scales = torch.ones(2, 96), torch.ones(192)
    assert list(quack.ways([Gemm(x, weight, torch.zeros(192).bfloat16(), scales=scales)])) == ["quack 128x208"]
    assert not quack.ways([Gemm(x, weight, torch.zeros(192), scales=scales)])


@pytest.mark.parametrize(
    "gemm",
    [
        halves(x=torch.randn(2, 96, 64)),
        halves(191),  # rows of the result
        halves(x=torch.randn(2, 64, 96).bfloat16().mT),
        halves(x=torch.randn(2, 96, 65).bfloat16()[..., 1:]),
    ],
    ids=["float32", "odd outputs", "transposed", "off by two bytes"],
)
def test_what_does_not_is_not(quack: Quack, gemm: Gemm) -> None:
    assert not quack.ways([gemm])


def test_two_are_one_where_their_weights_and_biases_adjoin_and_the_second_has_gelu(quack: Quack) -> None:
    whole = halves(224)
    (w1, w2), (b1, b2) = whole.weight.split((96, 128)), whole.bias.split((96, 128))
    first, second = Gemm(whole.x, w1, b1), Gemm(whole.x, w2, b2, gelu=True)
    assert list(quack.ways([first, second])) == ONE
    assert not quack.ways([second, first])
    assert not quack.ways([first, Gemm(whole.x, w2, b2)])
    assert not quack.ways([first, Gemm(whole.x, w2.clone(), b2, gelu=True)])
    assert not quack.ways([first, Gemm(whole.x, w2, b2.clone(), gelu=True)])


def missing(name: str) -> Exception:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (missing("quack"), None),
        (missing("cutlass"), "No module named 'cutlass'"),
        (ImportError("libcute.so: cannot open shared object file"), "libcute.so: cannot open shared object file"),
        (TypeError("epilogue fn depends on …\nmore"), "epilogue fn depends on …"),
    ],
    ids=["not installed", "a part is missing", "a library file is missing", "its own decorator fails"],
)
def test_a_package_that_cannot_be_imported_is_left_out(raised: Exception, told: str | None, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Raising:
        def find_spec(self, module: str, *about: object) -> None:
            if module.partition(".")[0] == "quack":
                raise raised

    monkeypatch.setattr(sys, "meta_path", [Raising(), *sys.meta_path])
    for module in [each for each in sys.modules if each.partition(".")[0] == "quack"]:
        monkeypatch.delitem(sys.modules, module)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert Quack.here("cuda:0") is None
    assert [str(each.message) for each in said] == (
        [] if told is None else [f"quack-kernels cannot be used and is left out: {told}"]
    )


def test_an_epilogue_that_a_release_refuses_costs_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen where packages lie in a folder not named site-packages: the package itself is imported well."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def refuse(**about: object) -> None:
        raise TypeError("epilogue fn depends on …")

    contents = {
        "quack": {"__path__": []},
        "quack.gemm_config": {"GemmConfig": dict},
        "quack.activation": {"gelu_tanh_approx": None},
        "quack.epilogue": {"__path__": []},
        "quack.epilogue.frontend": {"EpiMod": object, "gemm_epilogue": refuse},
        "quack.epilogue.ops": {"ColVecLoad": str, "RowVecLoad": str, "TileLoad": str},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fluxcli.engine.matmul.epilogues", raising=False)
    with pytest.warns(UserWarning, match=r"quack-kernels cannot be used and is left out: epilogue fn depends on …$"):
        assert Quack.here("cuda:0") is None
