"""A matmul of a layer, as every backend is handed it, and what a backend is.

scaled   numbers in 8 bits
torch_   the plain reference, and torch's own calls on CUDA
quack    quack-kernels, on Hopper where it is installed
matmul   each problem by the fastest of these
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fluxcli.engine.matmul.layout import adjacent, alignment


@dataclass(frozen=True, slots=True)
class Gemm:
    """x [..., K] times the transpose of weight [N, K], plus bias [N] -> [..., N], in x's dtype; sums in float32.

    Attributes:
        gelu: the result goes through GELU in its tanh form.
        out: where the result goes, None for a new tensor; its rows, and its batches, may lie apart.
        add: the result, which has no bias then, is added to what `out` holds, which is contiguous.
        scales: of an x and a weight in 8 bits, whose values these are then: what each row [...] of x and each row [N]
            of the weight is multiplied by, in float32. The result is in the bias's dtype; no `gelu`, no `add`.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gelu: bool = False
    out: Tensor | None = None
    add: bool = False
    scales: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The result's."""
        if self.scales is None:
            return self.x.dtype
        assert self.bias is not None and not (self.gelu or self.add)
        return self.bias.dtype

    @property
    def rows(self) -> int:
        return self.x.shape[:-1].numel()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(each for each in (self.x, self.weight, self.bias, self.out) if each is not None)

    @property
    def one_matrix(self) -> bool:
        """Whether the rows of all batches can be taken as those of one matrix."""
        return adjacent(self.x) and (self.out is None or adjacent(self.out))

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's."""
        return *self.x.shape[:-1], self.weight.shape[0]

    @property
    def kind(self) -> str:
        return "add" if self.add else "gelu" if self.gelu else "bias"

    def problem(self) -> str:
        """All of this matmul that the choice of a way depends on, as a name for the tuner's table."""
        x, out = self.x, self.out
        outputs, one = self.weight.shape[0], self.one_matrix
        batches = 1 if one else len(x)
        strides = (0 if one else x.stride(0), x.stride(-2), self.weight.stride(0))
        if out is None:
            result = (0 if one else self.rows // batches * outputs, outputs)
        else:
            result = (0 if one else out.stride(0), out.stride(-2))
        numbers = (batches, self.rows // batches, x.shape[-1], outputs, *strides, *result, alignment(*self.tensors))
        dtypes = " ".join(str(each).removeprefix("torch.") for each in dict.fromkeys((x.dtype, self.dtype)))
        return f"{self.kind} {dtypes} {'x'.join(map(str, numbers))}"


class Backend(Protocol):
    """A library that multiplies.

    Several gemms at once have one x, and weights and biases that follow each other in memory: a library may do them as
    one matmul.
    """

    release: str  # its name and version

    def ways(self, gemms: Sequence[Gemm]) -> Sequence[str]:
        """Names, which begin with the library's, of the ways it has for these; none where it has none here."""

    def run(self, way: str, gemms: Sequence[Gemm]) -> tuple[Tensor, ...]:
        """The result of each."""


class Multiply(Protocol):
    """What a layer calls: `Matmul`, or the plain `torch_.Reference`."""

    def __call__(self, gemm: Gemm) -> Tensor: ...

    def pair(self, first: Gemm, second: Gemm) -> tuple[Tensor, Tensor]:
        """Two gemms over one x whose weights, and biases, follow each other in memory."""
