"""The matrix products of a step: whatever is chosen for a shape, it computes the same."""

import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.core.errors import Remark
from fluxcli.core.records import ShapeKey
from fluxcli.engine.attention import backends
from fluxcli.engine.engine import Engine
from fluxcli.engine.layers import ops
from fluxcli.engine.matmul import cublaslt, pingpong, products
from fluxcli.engine.matmul.cublaslt import problem_of
from fluxcli.engine.runtime import stopwatch as clock
from fluxcli.engine.runtime import tuner
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.models.checkpoints import resolve
from tests.engine.layers.test_ops import TOLERANCE, error, exact
from tests.pipelines import DEEP

TORCH = products.TORCH
HALVES = [torch.bfloat16, torch.float16]


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")(test))


@pytest.fixture(autouse=True)
def empty_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "_table", {})


def layer(dtype: torch.dtype, device: str, rows: int = 96, inputs: int = 64, outputs: int = 192):
    return (
        torch.randn(2, rows, inputs, device=device).to(dtype),
        torch.randn(outputs, inputs, device=device).div(8).to(dtype),
        torch.randn(outputs, device=device).to(dtype),
    )


def test_rows_that_follow_each_other_are_one_product() -> None:
    x, weight, bias = layer(torch.bfloat16, "cpu")
    problem = problem_of("bias", x, weight, bias, None)
    assert (problem.batches, problem.rows, problem.inputs, problem.outputs) == (1, 192, 64, 192)
    assert (problem.row_stride, problem.weight_stride) == (64, 64)


def test_a_part_of_every_sequence_is_a_batch_of_products() -> None:
    x, weight, bias = layer(torch.bfloat16, "cpu")
    problem = problem_of("bias", x[:, 32:], weight, bias, None)
    assert (problem.batches, problem.rows, problem.batch_stride) == (2, 64, 96 * 64)
    assert problem_of("bias", x[:1, 32:], weight, bias, None).batches == 1


def test_a_result_between_others_is_a_batch_of_products_or_one_with_a_stride() -> None:
    x, weight, bias = layer(torch.bfloat16, "cpu")
    problem = problem_of("bias", x, weight, bias, torch.empty(2, 128, 192).bfloat16()[:, 32:])
    assert (problem.batches, problem.batch_stride, problem.out_batch_stride) == (2, 96 * 64, 128 * 192)
    problem = problem_of("bias", x, weight, bias, torch.empty(2, 96, 256).bfloat16()[..., 64:])
    assert (problem.batches, problem.rows, problem.out_row_stride) == (1, 192, 256)


def test_a_part_of_a_weight_keeps_its_stride() -> None:
    x, *_ = layer(torch.bfloat16, "cpu", inputs=32)
    wide = torch.randn(192, 96).bfloat16()
    assert problem_of("add", x, wide[:, 64:], None, torch.empty(2, 96, 192).bfloat16()).weight_stride == 96


def test_alignment_is_the_least_of_all_tensors() -> None:
    x, weight, bias = layer(torch.bfloat16, "cpu")
    odd = torch.empty(193).bfloat16()[1:]
    assert problem_of("bias", x, weight, odd, None).alignment == 2
    assert problem_of("bias", x, weight[:191], bias[:191], None).alignment == 2  # rows of the result


@pytest.mark.parametrize("lies", ["float32", "transposed"])
def test_what_cublaslt_is_not_asked_for(lies: str) -> None:
    x, weight, bias = layer(torch.float32 if lies == "float32" else torch.bfloat16, "cpu")
    assert problem_of("bias", x.mT.contiguous().mT if lies == "transposed" else x, weight, bias, None) is None


def reference(kind: str, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    x, weight, bias, y = map(exact, (x, weight, bias, y))
    if kind == "add":
        return y + x @ weight.T
    return ops.linear_gelu(x, weight, bias) if kind == "gelu" else ops.linear(x, weight, bias)


def name(problem, device: str = "cuda") -> str:
    """As the table has it."""
    return f"{problem.name}; cublaslt {cublaslt.version()}; {pingpong.release(torch.device(device))}"


@on_gpu
@pytest.mark.parametrize("part", ["whole", "of every sequence", "into every sequence", "into every row"])
@pytest.mark.parametrize("kind", ["bias", "gelu", "add"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_candidate_is_right(dtype: torch.dtype, kind: str, part: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = layer(dtype, "cuda", 640, 512, 768)
    x = x[:, 128:] if part == "of every sequence" else x
    rows = x.shape[1]
    before = {
        "into every sequence": torch.randn(2, rows + 128, 768)[:, 128:],
        "into every row": torch.randn(2, rows, 1024)[..., 256:],
    }.get(part, torch.randn(2, rows, 768))
    before = torch.empty_strided(before.shape, before.stride(), device="cuda", dtype=dtype).copy_(before)
    if kind == "add" and part.startswith("into"):
        pytest.skip("what is added to is contiguous")
    expected = reference(kind, x, weight, bias, before)
    target = before if kind == "add" or part.startswith("into") else None
    problem = problem_of(kind, x, weight, None if kind == "add" else bias, target)
    found = products.candidates(problem, x.device)
    assert len(found) > 1 and found[0] == TORCH and set(pingpong.choices(x.device)) <= set(found)
    for choice in found:
        tuner.remember({name(problem): choice})
        y = before.clone() if kind == "add" else target
        made = (
            products.add_linear(y, x, weight) if kind == "add" else products.linear(x, weight, bias, kind == "gelu", y)
        )
        assert made.shape == expected.shape and error(made, expected) < 2 * TOLERANCE[dtype], choice
        assert y is None or made.data_ptr() == y.data_ptr()


@on_gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_gelu_may_be_for_a_part_of_the_outputs(batch: int) -> None:
    """By all that quack-kernels offers here."""
    torch.manual_seed(0)
    dtype, rows, dim = torch.bfloat16, 1040, 384
    x, weight, bias = torch.randn(batch, rows, dim), torch.randn(7 * dim, dim) * dim**-0.5, torch.randn(7 * dim)
    given = (*(each.to("cuda", dtype) for each in (x, weight, bias)), 3 * dim)
    expected = ops.linear_and_gelu(*map(exact, given))
    with tuner.tuning():
        ops.linear_and_gelu(*given)
    (own,) = [each for each in tuner.table() if each.startswith("from")]
    for choice in (products.APART, *pingpong.choices(given[0].device)):
        tuner.remember({own: choice})
        for one, other in zip(ops.linear_and_gelu(*given), expected, strict=True):
            assert error(one, other) < 2 * TOLERANCE[dtype], choice


@pytest.mark.parametrize("choice", ["quack 128x192", "cublaslt " + "00ff" * 32], ids=["quack", "cublaslt"])
@pytest.mark.parametrize("kind", ["bias", "gelu", "add"])
def test_what_the_table_says_is_what_runs(kind: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for both libraries, which are told what to do and where the result belongs."""
    told = []

    def by_quack(chosen, what, x, weight, out, bias=None, more=None) -> None:
        told.append((chosen, what))
        out.copy_(reference(what, x, weight, weight[:, 0] if bias is None else bias, out if more is None else more))

    def by_cublaslt(chosen, problem, x, weight, bias, y) -> None:
        told.append((f"cublaslt {chosen.hex()}", problem.kind))
        y.copy_(reference(problem.kind, x, weight, weight[:, 0] if bias is None else bias, y))

    monkeypatch.setattr(cublaslt, "version", lambda: 1)
    monkeypatch.setattr(pingpong, "release", lambda device: "quack 1")
    monkeypatch.setattr(cublaslt, "multiply", by_cublaslt)
    monkeypatch.setattr(pingpong, "multiply", by_quack)
    x, weight, bias = layer(torch.bfloat16, "cpu", rows=512)
    y = torch.randn(2, 512, 192).bfloat16()
    own = (x, weight, None, y) if kind == "add" else (x, weight, bias, None)
    tuner.remember({name(problem_of(kind, *own), "cpu"): choice})
    expected = reference(kind, x, weight, bias, y)
    made = products.add_linear(y, x, weight) if kind == "add" else products.linear(x, weight, bias, kind == "gelu")
    assert told == [(choice, kind)]
    assert error(made, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("choice", [None, products.APART, "quack 128x192"])
def test_gelu_for_a_part_is_done_where_the_table_says(choice: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for quack-kernels, which is told what belongs into the epilogue."""
    told = []

    def by_quack(chosen, kind, inputs, weight, out, bias, curved) -> None:
        told.append((chosen, kind))
        assert set(curved.tolist()) == {0, 1}
        plain = inputs @ weight.T + bias
        out.copy_(torch.where(curved > 0, F.gelu(plain, approximate="tanh"), plain))

    monkeypatch.setattr(cublaslt, "version", lambda: 1)
    monkeypatch.setattr(pingpong, "release", lambda device: "quack 1")
    monkeypatch.setattr(pingpong, "multiply", by_quack)
    monkeypatch.setattr(tuner, "fastest", lambda name, *rest: choice if name.startswith("from") else None)
    torch.manual_seed(0)
    x = torch.randn(2, 512, 32).bfloat16()
    weight, bias = torch.randn(224, 32).div(6).bfloat16(), torch.randn(224).bfloat16()
    ours = products.linear_and_gelu(x, weight, bias, 96)
    theirs = ops.linear_and_gelu(*map(exact, (x, weight, bias)), 96)
    assert told == ([(choice, "gelu_in_part")] if str(choice).startswith("quack") else [])
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("installed", [False, True])
def test_quack_kernels_that_cannot_be_imported_are_told(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Absent:
        def find_spec(self, module: str, *about: object) -> None:
            if module == "quack":
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    for module in [each for each in sys.modules if each.partition(".")[0] == "quack"]:
        monkeypatch.delitem(sys.modules, module)
    if installed:
        monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    pingpong._package.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert pingpong.choices(torch.device("cuda:0")) == ()
    pingpong._package.cache_clear()
    assert ["quack-kernels cannot be imported" in str(each.message) for each in said] == [True] * installed


@on_gpu
def test_few_rows_are_left_to_torch() -> None:
    x, weight, bias = layer(torch.bfloat16, "cuda")
    with tuner.tuning():
        products.linear(x, weight, bias)
    assert not tuner.table()


@on_gpu
def test_shapes_are_timed_once_and_only_while_tuning() -> None:
    x, weight, bias = layer(torch.bfloat16, "cuda", rows=1024)
    products.linear(x, weight, bias)
    assert not tuner.table()
    with tuner.tuning():
        products.linear(x, weight, bias)
        products.linear(x, weight.clone(), bias)
    (choice,) = tuner.table().values()
    assert choice == TORCH or choice.startswith(("cublaslt ", "quack "))


@on_gpu
def test_adding_while_tuning_adds_once() -> None:
    x, weight, _ = layer(torch.bfloat16, "cuda", rows=1024)
    before = torch.randn(2, 1024, 192, device="cuda").bfloat16()
    with tuner.tuning():
        made = products.add_linear(before.clone(), x, weight)
    assert error(made, reference("add", x, weight, weight[:, 0], before)) < 2 * TOLERANCE[torch.bfloat16]


@on_gpu
@pytest.mark.parametrize("kind", ["bias", "gelu"])
def test_tuning_writes_where_the_result_belongs_and_nowhere_else(kind: str) -> None:
    x, weight, bias = layer(torch.bfloat16, "cuda", rows=1024)
    whole = torch.full((2, 1280, 256), 7.0, device="cuda").bfloat16()
    part = whole[:, 128:1152, :192]
    with tuner.tuning():
        products.linear(x, weight, bias, kind == "gelu", out=part)
    assert error(part, reference(kind, x, weight, bias, part)) < 2 * TOLERANCE[torch.bfloat16]
    assert (whole.sum(dtype=torch.float64) - part.sum(dtype=torch.float64)).item() == 7 * (whole.numel() - part.numel())


@on_gpu
def test_every_tile_of_flash_attention_4_is_right() -> None:
    tiles = (
        backends._fa4_tiles(torch.device("cuda:0")) if backends.missing("fa4", "cuda", torch.bfloat16) is None else {}
    )
    if not tiles:
        pytest.skip("FlashAttention-4 is not installed, or leaves no choice here")
    torch.manual_seed(0)
    qkv = torch.randn(2, 700, 7, 4, 128, device="cuda").bfloat16()[:, :, :3]
    expected = backends.attention(exact(qkv), "sdpa")
    with tuner.tuning():
        backends.attention(qkv, "fa4")
    (own,) = tuner.table()
    for tile in tiles:
        tuner.remember({own: tile})
        assert error(backends.attention(qkv, "fa4"), expected) < 2 * TOLERANCE[torch.bfloat16], tile


@on_gpu
def test_a_later_engine_takes_over_what_was_chosen(pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path))
    key = ShapeKey(4, 256, 256, 64)

    def warmed() -> dict[str, str]:
        Engine(resolve(str(pipeline(DEEP))), resolve_device("cuda", "bfloat16", None, "auto")).warm_up([key])
        return tuner.table()

    first = warmed()
    (file,) = tmp_path.rglob("choices.json")
    assert json.loads(file.read_text()) == first and first
    tuner._table.clear()
    monkeypatch.setattr(tuner, "_timed", lambda *args: pytest.fail("timed again"))
    assert warmed() == first


class TestChoices:
    """The table itself, with a clock that counts what each way is said to take."""

    @pytest.fixture(autouse=True)
    def stopwatch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuner, "_recorded", lambda way, pool: way)
        monkeypatch.setattr(tuner, "aside", nullcontext)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        monkeypatch.setattr(clock, "seconds", lambda run, calls, device: run())
        monkeypatch.setattr(
            clock, "interleaved", lambda runs, device, turn: {each: [run()] for each, run in runs.items()}
        )

    def settle(self, **seconds: float) -> str | None:
        ways = {each: lambda taken=taken: taken for each, taken in seconds.items()}
        return tuner.fastest("a product", lambda: ways, torch.device("cpu"))

    def test_the_fastest_is_taken_and_stays(self) -> None:
        assert self.settle(one=3, other=2) is None
        with tuner.tuning():
            assert self.settle(one=3, other=2, third=5) == "other"
            assert self.settle(one=1, other=2) == "other"
        assert self.settle(one=1) == "other" and tuner.table() == {"a product": "other"}

    def test_what_cannot_run_is_left_out_and_said_once(self) -> None:
        tuner._left_out.cache_clear()

        def broken() -> float:
            raise RuntimeError("no such kernel\nat some place")

        ways = {"torch": lambda: 2.0, "quack 1": broken, "quack 2": broken}
        with tuner.tuning(), pytest.warns(Remark, match="quack .* is left out: no such kernel$") as said:
            assert tuner.fastest("a product", lambda: ways, torch.device("cpu")) == "torch"
        assert len(said) == 1

    def test_the_first_way_must_run(self) -> None:
        def broken() -> float:
            raise RuntimeError("the device is gone")

        with tuner.tuning(), pytest.raises(RuntimeError, match="the device is gone"):
            tuner.fastest("a product", lambda: {"torch": broken, "quack": lambda: 1}, torch.device("cpu"))
