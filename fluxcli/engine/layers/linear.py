"""Linear layers: a weight and a bias, and how a block asks for their matmul."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxcli.engine.matmul.gemm import Gemm, Multiply


class Linear(nn.Module):
    """weight [N, K] and bias [N], whose memory is not initialised: the strict load fills every element.

    Args:
        multiply: does its matmuls.
    """

    def __init__(self, in_features: int, out_features: int, multiply: Multiply) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self._multiply = multiply

    def forward(self, x: Tensor, gelu: bool = False, out: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N], through GELU in its tanh form where `gelu`; into `out` where that is given."""
        return self._multiply(Gemm(x, self.weight, self.bias, gelu, out))


class LinearToTwo(Linear):
    """Two layers over one input, as one: the second's outputs, from `first` on, go through GELU."""

    def __init__(self, in_features: int, first: int, second: int, multiply: Multiply) -> None:
        super().__init__(in_features, first + second, multiply)
        self._outputs = (first, second)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x [..., K] -> [..., first], [..., second], whose rows may lie apart."""
        weights, biases = self.weight.split(self._outputs), self.bias.split(self._outputs)
        return self._multiply.pair(Gemm(x, weights[0], biases[0]), Gemm(x, weights[1], biases[1], gelu=True))


class LinearOfTwo(Linear):
    """A layer over two inputs side by side, without laying them there: the second matmul adds to the first's result."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        """a [B, S, K1], b [B, S, K2], with K1 + K2 = K -> [B, S, N]."""
        first, second = self.weight.split((a.shape[-1], b.shape[-1]), dim=1)
        out = self._multiply(Gemm(a, first, self.bias))
        return self._multiply(Gemm(b, second, None, out=out, add=True))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int, multiply: Multiply) -> None:
        super().__init__()
        self.up = Linear(dim, hidden, multiply)
        self.down = Linear(hidden, dim, multiply)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x, gelu=True))


def joined(layers: Sequence[Linear], inputs: Sequence[Tensor]) -> Tensor:
    """Each input [B, S_i, K] through its own layer, the results side by side along the tokens: [B, S, N]."""
    lengths = [x.shape[1] for x in inputs]
    out = inputs[0].new_empty(len(inputs[0]), sum(lengths), len(layers[0].weight))
    for layer, x, part in zip(layers, inputs, out.split(lengths, dim=1), strict=True):
        layer(x, out=part)
    return out
