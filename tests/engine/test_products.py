"""The matrix products of a step: whatever is chosen for a shape, it computes the same."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxcli.checkpoints import resolve
from fluxcli.engine import cublaslt, ops, pingpong, products
from fluxcli.engine.cublaslt import problem_of
from fluxcli.engine.device import resolve as resolve_device
from fluxcli.engine.engine import Engine
from fluxcli.records import ShapeKey
from tests.engine.test_ops import TOLERANCE, error, exact
from tests.pipelines import DEEP

TORCH = products.TORCH
HALVES = [torch.bfloat16, torch.float16]


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")(test))


@pytest.fixture(autouse=True)
def empty_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_choices", {})


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


def test_a_part_of_a_weight_keeps_its_stride() -> None:
    x, *_ = layer(torch.bfloat16, "cpu", inputs=32)
    wide = torch.randn(192, 96).bfloat16()
    assert problem_of("add", x, wide[:, 64:], None, torch.empty(2, 96, 192).bfloat16()).weight_stride == 96


def test_alignment_is_the_least_of_all_tensors() -> None:
    x, weight, _ = layer(torch.bfloat16, "cpu")
    odd = torch.empty(193).bfloat16()[1:]
    assert problem_of("bias", x, weight, odd, None).alignment == 2


@pytest.mark.parametrize("lies", ["float32", "transposed"])
def test_what_cublaslt_is_not_asked_for(lies: str) -> None:
    x, weight, bias = layer(torch.float32 if lies == "float32" else torch.bfloat16, "cpu")
    assert problem_of("bias", x.mT.contiguous().mT if lies == "transposed" else x, weight, bias, None) is None


def reference(kind: str, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    x, weight, bias, y = map(exact, (x, weight, bias, y))
    if kind == "add":
        return y + x @ weight.T
    return ops.linear_gelu(x, weight, bias) if kind == "gelu" else ops.linear(x, weight, bias)


@on_gpu
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part of every sequence"])
@pytest.mark.parametrize("kind", ["bias", "gelu", "add"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_candidate_is_right(dtype: torch.dtype, kind: str, part: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = layer(dtype, "cuda", 640, 512, 768)
    x = x[:, 128:] if part else x
    before = torch.randn(*x.shape[:-1], 768, device="cuda").to(dtype)
    expected = reference(kind, x, weight, bias, before)
    own = (x, weight, None, before) if kind == "add" else (x, weight, bias, None)
    problem = problem_of(kind, *own)
    found = products.candidates(problem, x.device)
    assert len(found) > 1 and found[0] == TORCH
    assert part or set(pingpong.choices(x.device)) <= set(found)
    for choice in found:
        products.remember({problem.name: choice}, x.device)
        y = before.clone()
        made = products.add_linear(y, x, weight) if kind == "add" else products.linear(x, weight, bias, kind == "gelu")
        assert made.shape == expected.shape and error(made, expected) < 2 * TOLERANCE[dtype], choice


@pytest.mark.parametrize("choice", ["quack 128x192", "00ff" * 32], ids=["quack", "cublaslt"])
@pytest.mark.parametrize("kind", ["bias", "gelu", "add"])
def test_what_the_table_says_is_what_runs(kind: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for both libraries, which are told what to do and where the result belongs."""
    told = []

    def stand_in(chosen, what, x, weight, bias, y) -> None:
        told.append((chosen, what if isinstance(what, str) else what.kind))
        y.copy_(reference(kind, x, weight, weight[:, 0] if bias is None else bias, y))

    monkeypatch.setattr(cublaslt, "version", lambda: 1)
    monkeypatch.setattr(cublaslt, "multiply", stand_in)
    monkeypatch.setattr(pingpong, "multiply", stand_in)
    x, weight, bias = layer(torch.bfloat16, "cpu")
    y = torch.randn(2, 96, 192).bfloat16()
    own = (x, weight, None, y) if kind == "add" else (x, weight, bias, None)
    monkeypatch.setitem(products._choices, problem_of(kind, *own).name, choice)
    expected = reference(kind, x, weight, bias, y)
    made = products.add_linear(y, x, weight) if kind == "add" else products.linear(x, weight, bias, kind == "gelu")
    assert told == [(choice if choice.startswith("quack") else bytes.fromhex(choice), kind)]
    assert error(made, expected) < TOLERANCE[torch.bfloat16]


def test_what_is_no_longer_installed_is_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pingpong, "choices", lambda device: ())
    products.remember({"one": "quack 128x192", "other": TORCH}, torch.device("cpu"))
    assert products.choices() == {"other": TORCH}


@on_gpu
def test_few_rows_are_left_to_torch() -> None:
    x, weight, bias = layer(torch.bfloat16, "cuda")
    with products.tuning():
        products.linear(x, weight, bias)
    assert not products.choices()


@on_gpu
def test_shapes_are_timed_once_and_only_while_tuning() -> None:
    x, weight, bias = layer(torch.bfloat16, "cuda", rows=1024)
    products.linear(x, weight, bias)
    assert not products.choices()
    with products.tuning():
        products.linear(x, weight, bias)
        products.linear(x, weight.clone(), bias)
    (choice,) = products.choices().values()
    assert choice == TORCH or choice.startswith("quack") or len(bytes.fromhex(choice)) == 64


@on_gpu
def test_adding_while_tuning_adds_once() -> None:
    x, weight, _ = layer(torch.bfloat16, "cuda", rows=1024)
    before = torch.randn(2, 1024, 192, device="cuda").bfloat16()
    with products.tuning():
        made = products.add_linear(before.clone(), x, weight)
    assert error(made, reference("add", x, weight, weight[:, 0], before)) < 2 * TOLERANCE[torch.bfloat16]


@on_gpu
def test_a_later_engine_takes_over_what_was_chosen(pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXCLI_CACHE", str(tmp_path))
    key = ShapeKey(4, 256, 256, 64)

    def warmed() -> dict[str, str]:
        Engine(resolve(str(pipeline(DEEP))), resolve_device("cuda", "bfloat16", None, "auto")).warm_up([key])
        return products.choices()

    first = warmed()
    (file,) = tmp_path.rglob("products.json")
    assert json.loads(file.read_text()) == first and first
    products._choices.clear()
    monkeypatch.setattr(products, "_fastest", lambda *args: pytest.fail("timed again"))
    assert warmed() == first
