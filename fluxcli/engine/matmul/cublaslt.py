"""cuBLASLt, by ctypes: its suggestions for a matrix product, and the call with one of them.

Names and numbers are those of cublasLt.h and library_types.h. It counts in columns: what it is told to make is y^T
[outputs, rows], of the weight, transposed, and x^T.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fluxcli.engine.matmul.layout import adjacent, alignment

_WORKSPACE = 2**25  # bytes; what cuBLAS takes for itself on Hopper
_COMPUTE_32F, _R_32F, _TYPES = 68, 0, {torch.float16: 2, torch.bfloat16: 14}
_TRANSA, _EPILOGUE, _BIAS_POINTER, _BIAS_TYPE = 3, 7, 8, 26  # of cublasLtMatmulDescAttributes_t
_BATCH_COUNT, _BATCH_OFFSET = 5, 6  # of cublasLtMatrixLayoutAttribute_t
_PREF_WORKSPACE, _PREF_REDUCTION, _PREF_ALIGNMENT = 1, 3, (5, 6, 7, 8)  # of cublasLtMatmulPreferenceAttributes_t
_OP_T = 1
_EPILOGUES = {"bias": 4, "gelu": 36, "add": 1}
# Split sums are added in order, in float32: sums that race for one place would differ from run to run.
_REDUCTION_COMPUTE_TYPE = 2
_SUGGESTIONS = 16  # asked for; there are about 8 for a shape of FLUX.1's
_ALGORITHM = ctypes.c_uint64 * 8
_ANY_POINTER = 256  # aligned as well as can be


class Problem(NamedTuple):
    """All that a choice depends on: y [batches, rows, outputs] = x [batches, rows, inputs] times a weight.

    kind: "bias", "gelu" (of product and bias) or "add" (to what y holds). Strides count elements; where all
    batches are one matrix there are none between them. alignment is in bytes.
    """

    kind: str
    dtype: torch.dtype
    batches: int
    rows: int
    inputs: int
    outputs: int
    batch_stride: int
    row_stride: int
    weight_stride: int
    out_batch_stride: int
    out_row_stride: int
    alignment: int

    @property
    def name(self) -> str:
        kind, dtype, *numbers = self
        return f"{kind} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, numbers))}"


def problem_of(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor | None) -> Problem | None:
    """None where cuBLASLt is not asked: for float32, and for tensors that do not lie as it wants them.

    Args:
        y: where the result goes; None for a new tensor.
    """
    tall = [each for each in (x, y) if each is not None]
    if x.dtype not in _TYPES or any(each.stride(-1) != 1 for each in (*tall, weight)):
        return None
    outputs, one = weight.shape[0], all(map(adjacent, tall))
    if not one and x.ndim != 3:
        return None
    batches = 1 if one else x.shape[0]
    rows = x.shape[:-1].numel() // batches
    out_row_stride = outputs if y is None else y.stride(-2)
    out_batch_stride = 0 if one else rows * outputs if y is None else y.stride(0)
    row_bytes = out_row_stride * x.element_size()
    return Problem(
        kind, x.dtype, batches, rows, x.shape[-1], outputs,
        0 if one else x.stride(0), x.stride(-2), weight.stride(0), out_batch_stride, out_row_stride,
        min(alignment(x, weight, bias, y), row_bytes & -row_bytes),
    )  # fmt: skip


class _Suggestion(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (
        ("algorithm", _ALGORITHM),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class _Plan(NamedTuple):
    """A problem's operation and the layouts of weight, x and y."""

    operation: ctypes.c_void_p
    weight: ctypes.c_void_p
    x: ctypes.c_void_p
    y: ctypes.c_void_p


@cache
def version() -> int:
    library = _library()
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    return int(library.cublasLtGetVersion())


def suggestions(problem: Problem) -> list[bytes]:
    """cuBLASLt's algorithms for a problem, its favourite first; none where it cannot do it."""
    library, plan = _library(), _plan(problem)
    preference = _made(library.cublasLtMatmulPreferenceCreate)
    settings = {_PREF_WORKSPACE: ctypes.c_uint64(_WORKSPACE), _PREF_REDUCTION: ctypes.c_uint32(_REDUCTION_COMPUTE_TYPE)}
    settings |= dict.fromkeys(_PREF_ALIGNMENT, ctypes.c_uint32(problem.alignment))
    for attribute, value in settings.items():
        _set(library.cublasLtMatmulPreferenceSetAttribute, preference, attribute, value)
    found, count = (_Suggestion * _SUGGESTIONS)(), ctypes.c_int()
    status = library.cublasLtMatmulAlgoGetHeuristic(
        _handle(), *plan[:3], plan.y, plan.y, preference, _SUGGESTIONS, found, ctypes.byref(count)
    )
    library.cublasLtMatmulPreferenceDestroy(preference)
    return [] if status else [bytes(each.algorithm) for each in found[: count.value] if each.state == 0]


def multiply(algorithm: bytes, problem: Problem, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Fills y, or adds to it, by one of the suggestions for `problem`, which is these tensors'."""
    library, plan = _library(), _plan(problem)
    if bias is not None:
        _set(library.cublasLtMatmulDescSetAttribute, plan.operation, _BIAS_POINTER, ctypes.c_uint64(bias.data_ptr()))
    alpha, beta = ctypes.c_float(1), ctypes.c_float(problem.kind == "add")
    workspace = _workspace(x.device)
    weights, inputs, outputs, scratch = (ctypes.c_void_p(each.data_ptr()) for each in (weight, x, y, workspace))
    _check(
        library.cublasLtMatmul(
            _handle(), plan.operation, ctypes.byref(alpha), weights, plan.weight, inputs, plan.x, ctypes.byref(beta),
            outputs, plan.y, outputs, plan.y, ctypes.byref(_ALGORITHM.from_buffer_copy(algorithm)),
            scratch, ctypes.c_size_t(_WORKSPACE), ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        ),
        problem,
    )  # fmt: skip


@cache
def _plan(problem: Problem) -> _Plan:
    library, dtype = _library(), _TYPES[problem.dtype]
    operation = _made(library.cublasLtMatmulDescCreate, _COMPUTE_32F, _R_32F)
    settings = {_TRANSA: ctypes.c_int32(_OP_T), _EPILOGUE: ctypes.c_uint32(_EPILOGUES[problem.kind])}
    if problem.kind != "add":  # each call sets its own pointer; suggestions are asked for with any
        settings |= {_BIAS_TYPE: ctypes.c_int32(dtype), _BIAS_POINTER: ctypes.c_uint64(_ANY_POINTER)}
    for attribute, value in settings.items():
        _set(library.cublasLtMatmulDescSetAttribute, operation, attribute, value)

    def layout(rows: int, columns: int, stride: int, batch_stride: int) -> ctypes.c_void_p:
        made = _made(
            library.cublasLtMatrixLayoutCreate,
            dtype, ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(stride),
        )  # fmt: skip
        if problem.batches > 1:
            _set(library.cublasLtMatrixLayoutSetAttribute, made, _BATCH_COUNT, ctypes.c_int32(problem.batches))
            _set(library.cublasLtMatrixLayoutSetAttribute, made, _BATCH_OFFSET, ctypes.c_int64(batch_stride))
        return made

    return _Plan(
        operation,
        layout(problem.inputs, problem.outputs, problem.weight_stride, 0),
        layout(problem.inputs, problem.rows, problem.row_stride, problem.batch_stride),
        layout(problem.outputs, problem.rows, problem.out_row_stride, problem.out_batch_stride),
    )


@cache
def _library() -> ctypes.CDLL:
    """The one that torch has loaded already."""
    return ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).partition('.')[0]}")


@cache
def _handle() -> ctypes.c_void_p:
    return _made(_library().cublasLtCreate)


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)


def _made(create: Any, *arguments: Any) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    _check(create(ctypes.byref(made), *arguments), create.__name__)
    return made


def _set(function: Any, target: ctypes.c_void_p, attribute: int, value: Any) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _check(function(target, attribute, ctypes.byref(value), size), f"{function.__name__} {attribute}")


def _check(status: int, what: object) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt: status {status} of {what}")
