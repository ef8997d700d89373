"""The matmuls of a step: whatever is chosen for a shape, it computes the same."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.core.records import ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.matmul.gemm import Gemm
from fluxcli.engine.matmul.matmul import Matmul
from fluxcli.engine.matmul.scaled import row_scaled
from fluxcli.engine.matmul.torch_ import WAY, Reference, Torch
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.runtime.tuner import Tuner
from fluxcli.models.checkpoints import resolve
from tests.engine.exact import HALVES, TOLERANCE, error, exact, on_gpu
from tests.pipelines import DEEP


def gemm(dtype: torch.dtype, device: str, kind: str = "bias", rows: int = 96, inputs: int = 64, outputs: int = 192):
    x = torch.randn(2, rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).div(8).to(dtype)
    if kind == "scaled":
        (x, of_x), (weight, of_weight) = row_scaled(x), row_scaled(weight)
        return Gemm(x, weight, torch.randn(outputs, device=device).to(dtype), scales=(of_x, of_weight))
    if kind == "add":
        out = torch.randn(2, rows, outputs, device=device).to(dtype)
        return Gemm(x, weight, None, out=out, add=True)
    return Gemm(x, weight, torch.randn(outputs, device=device).to(dtype), gelu=kind == "gelu")


def reference(given: Gemm) -> Tensor:
    """In float64; what is added to stays as it is."""
    x, weight, bias, out = map(exact, (given.x, given.weight, given.bias, given.out))
    if given.scales is not None:
        of_x, of_weight = map(exact, given.scales)
        return F.linear(x * of_x[..., None], weight * of_weight[:, None], bias)
    return Reference()(replace(given, x=x, weight=weight, bias=bias, out=out.clone() if given.add else None))


class Recorder:
    """A stand-in for a library, which computes by the reference and notes what it was asked for."""

    def __init__(self, name: str, pairs: bool = False, broken: bool = False) -> None:
        self.release, self._name, self._pairs, self._broken = f"{name} 1", name, pairs, broken
        self.asked: list[tuple[str, list[str]]] = []

    def ways(self, gemms: Sequence[Gemm]) -> Sequence[str]:
        names = (self._name, f"{self._name} two")
        return names if len(gemms) == 1 or self._pairs else ()

    def run(self, way: str, gemms: Sequence[Gemm]) -> tuple[Tensor, ...]:
        if self._broken:
            raise ValueError("no such kernel")
        self.asked.append((way, [each.kind for each in gemms]))
        return tuple(map(Reference(), gemms))


def with_backend(backend: Recorder, tuner: Tuner) -> Matmul:
    """A `Matmul` whose first backend is the reference too: torch's own fused calls are CUDA's."""
    made = Matmul.__new__(Matmul)
    made._tuner, made._torch = tuner, Recorder(WAY)
    made._backends = [made._torch, backend]
    made._here = ", ".join(each.release for each in made._backends)
    return made


@pytest.mark.parametrize("kind", ["bias", "gelu", "add"])
def test_what_the_table_says_is_what_runs(kind: str) -> None:
    backend, tuner = Recorder("quick"), Tuner("cpu")
    made, given = with_backend(backend, tuner), gemm(torch.float32, "cpu", kind, rows=512)
    tuner.table[made._named(given.problem())] = "quick two"
    expected = reference(given)
    assert error(made(given), expected) < TOLERANCE[torch.float32]
    assert backend.asked == [("quick two", [kind])]


def test_few_rows_are_left_to_torch() -> None:
    backend, tuner = Recorder("quick"), Tuner("cpu")
    made, given = with_backend(backend, tuner), gemm(torch.float32, "cpu")
    tuner.table[made._named(given.problem())] = "quick two"
    made(given)
    assert not backend.asked


def test_a_choice_among_other_releases_is_none() -> None:
    tuner = Tuner("cpu")
    made, given = with_backend(Recorder("quick"), tuner), gemm(torch.float32, "cpu", rows=512)
    tuner.table[made._named(given.problem())] = "quick two"
    other = Recorder("quick")
    other.release = "quick 2"
    with_backend(other, tuner)(given)
    assert not other.asked


@pytest.mark.parametrize("fused", [True, False])
def test_two_gemms_over_one_input_are_one_matmul_where_the_table_says(fused: bool) -> None:
    backend, tuner = Recorder("quick", pairs=True), Tuner("cpu")
    made, whole = with_backend(backend, tuner), gemm(torch.float32, "cpu", rows=512, outputs=224)
    (w1, w2), (b1, b2) = whole.weight.split((96, 128)), whole.bias.split((96, 128))
    first, second = Gemm(whole.x, w1, b1), Gemm(whole.x, w2, b2, gelu=True)
    if fused:
        tuner.table[made._named(f"{first.problem()} and {second.problem()}")] = "quick"
    results = made.pair(first, second)
    for one, other in zip(results, map(reference, (first, second)), strict=True):
        assert error(one, other) < TOLERANCE[torch.float32]
    assert backend.asked == ([("quick", ["bias", "gelu"])] if fused else [])


def test_a_library_that_fails_costs_nothing_but_a_remark() -> None:
    tuner = Tuner("cpu")
    made, given = with_backend(Recorder("quick", broken=True), tuner), gemm(torch.float32, "cpu", rows=512)
    tuner.table[made._named(given.problem())] = "quick two"
    with pytest.warns(UserWarning, match="quick cannot do here"):
        assert error(made(given), reference(given)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_matmul_in_8_bits_is_that_of_what_its_numbers_stand_for(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = gemm(dtype, "cpu", "scaled", rows=33)
    made = Reference()(given)
    assert made.dtype == dtype and error(made, reference(given)) < TOLERANCE[dtype]
    joint = torch.full((2, 40, 192), 7.0, dtype=dtype)
    Reference()(replace(given, out=joint[:, 7:]))
    assert torch.equal(joint[:, 7:], made) and (joint[:, :7] == 7).all()


def test_torchs_own_8_bit_matmul_is_right_wherever_the_result_goes() -> None:
    torch.manual_seed(0)
    given, backend = gemm(torch.bfloat16, "cpu", "scaled", rows=48), Torch()
    joint = torch.full((2, 64, 192), 7.0).bfloat16()
    cases = {("torch",): given, ("torch", "torch by image"): replace(given, out=joint[:, 16:])}
    for ways, case in cases.items():
        assert backend.ways([case]) == ways
        for way in ways:
            joint.fill_(7)
            (made,) = backend.run(way, [case])
            assert error(made, reference(case)) < TOLERANCE[torch.bfloat16]
            assert case.out is None or (made.data_ptr() == case.out.data_ptr() and (joint[:, :16] == 7).all())
    odd = gemm(torch.bfloat16, "cpu", "scaled", inputs=40, outputs=56)
    assert error(backend.run("torch", [odd])[0], reference(odd)) < TOLERANCE[torch.bfloat16]


def aligned(tensor: Tensor) -> Tensor:
    """A copy at an address that is a multiple of 256 bytes: a CPU's allocator promises less than a GPU's."""
    room = tensor.new_empty(tensor.numel() + 256)
    start = -room.data_ptr() % 256 // tensor.element_size()
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def test_a_problem_is_named_by_all_that_decides() -> None:
    given = gemm(torch.bfloat16, "cpu")
    given = replace(given, **{name: aligned(getattr(given, name)) for name in ("x", "weight", "bias")})
    wide = torch.randn(192, 96).bfloat16()
    names = {
        given.problem(),
        replace(given, gelu=True).problem(),
        replace(given, x=given.x[:, 32:]).problem(),  # a part of every sequence
        replace(given, x=torch.randn(2, 96, 128).bfloat16()[..., :64]).problem(),
        replace(given, weight=wide[:, 32:]).problem(),
        replace(given, out=torch.empty(2, 128, 192).bfloat16()[:, 32:]).problem(),
        replace(given, out=torch.empty(2, 96, 256).bfloat16()[..., 64:]).problem(),
        replace(given, bias=torch.empty(193).bfloat16()[1:]).problem(),  # its alignment
        gemm(torch.float16, "cpu").problem(),
        gemm(torch.bfloat16, "cpu", "scaled").problem(),
        gemm(torch.float32, "cpu", "scaled").problem(),
    }
    assert len(names) == 11
    assert given.problem() == replace(given, x=aligned(given.x), weight=aligned(given.weight)).problem()


@on_gpu
@pytest.mark.parametrize("part", ["whole", "of every sequence", "into every sequence", "into every row"])
@pytest.mark.parametrize("kind", ["bias", "gelu", "add", "scaled"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_way_is_right(dtype: torch.dtype, kind: str, part: str) -> None:
    torch.manual_seed(0)
    if kind == "scaled" and (dtype != torch.bfloat16 or part in ("of every sequence", "into every row")):
        pytest.skip("8-bit numbers are whole, and made in bfloat16")
    given = gemm(dtype, "cuda", kind, 640, 512, 768)
    if part == "of every sequence":
        given = replace(given, x=given.x[:, 128:], out=given.out[:, 128:].contiguous() if given.add else None)
    if part.startswith("into"):
        if kind == "add":
            pytest.skip("what is added to is contiguous")
        into = torch.randn(2, 768, 768)[:, 128:] if part.endswith("sequence") else torch.randn(2, 640, 1024)[..., 256:]
        into = torch.empty_strided(into.shape, into.stride(), device="cuda", dtype=dtype).copy_(into)
        given = replace(given, out=into)
    expected = reference(given)
    made = Matmul(Tuner("cuda:0"), "cuda:0")
    for backend in made._backends:
        for way in backend.ways([given]):
            own = replace(given, out=given.out.clone()) if given.add else given
            (result,) = backend.run(way, [own])
            assert result.shape == expected.shape and error(result, expected) < 2 * TOLERANCE[dtype], way
            assert own.out is None or result.data_ptr() == own.out.data_ptr()


@on_gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_every_way_of_two_gemms_over_one_input_is_right(batch: int) -> None:
    torch.manual_seed(0)
    dim = 384
    x, weight, bias = torch.randn(batch, 1040, dim), torch.randn(7 * dim, dim) * dim**-0.5, torch.randn(7 * dim)
    x, weight, bias = (each.to("cuda", torch.bfloat16) for each in (x, weight, bias))
    (w1, w2), (b1, b2) = weight.split((3 * dim, 4 * dim)), bias.split((3 * dim, 4 * dim))
    gemms = [Gemm(x, w1, b1), Gemm(x, w2, b2, gelu=True)]
    made = Matmul(Tuner("cuda:0"), "cuda:0")
    results = [made.pair(*gemms)]
    results += [backend.run(way, gemms) for backend in made._backends for way in backend.ways(gemms)]
    for result in results:
        for one, other in zip(result, map(reference, gemms), strict=True):
            assert error(one, other) < 2 * TOLERANCE[torch.bfloat16]


@on_gpu
def test_adding_while_tuning_adds_once() -> None:
    given, tuner = gemm(torch.bfloat16, "cuda", "add", rows=1024), Tuner("cuda:0")
    expected = reference(given)
    with tuner.tuning():
        made = Matmul(tuner, "cuda:0")(given)
    assert error(made, expected) < 2 * TOLERANCE[torch.bfloat16]
    assert len(tuner.table) == 1


@on_gpu
@pytest.mark.parametrize("kind", ["bias", "gelu"])
def test_tuning_writes_where_the_result_belongs_and_nowhere_else(kind: str) -> None:
    whole = torch.full((2, 1280, 256), 7.0, device="cuda").bfloat16()
    part = whole[:, 128:1152, :192]
    given, tuner = replace(gemm(torch.bfloat16, "cuda", kind, rows=1024), out=part), Tuner("cuda:0")
    with tuner.tuning():
        Matmul(tuner, "cuda:0")(given)
    assert error(part, reference(given)) < 2 * TOLERANCE[torch.bfloat16]
    assert (whole.sum(dtype=torch.float64) - part.sum(dtype=torch.float64)).item() == 7 * (whole.numel() - part.numel())


@on_gpu
def test_a_later_engine_takes_over_what_was_chosen(pipeline, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path))
    key = ShapeKey(4, 256, 256, 64)

    def warmed() -> dict[str, str]:
        engine = Engine(resolve(str(pipeline(DEEP))), resolve_device("cuda", "bfloat16", None, "auto"))
        engine.warm_up([key])
        return engine._tuner.table

    first = warmed()
    assert first
    monkeypatch.setattr(Tuner, "_timed", lambda *args: pytest.fail("timed again"))
    assert warmed() == first
