"""Linear layers: a weight and a bias, and how a block asks for their matmul.

A layer in fp8 holds its weight in 8 bits, with a scale for each output, and takes its input in 8 bits (`scaling`). Its
results are in the model's dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxcli.engine.layers.scaling import BeforeGelu, Input, scaled, scaled_together
from fluxcli.engine.matmul.gemm import Gemm, Multiply
from fluxcli.engine.matmul.scaled import E4M3, Scaled


class Linear(nn.Module):
    """weight [N, K] and bias [N], whose memory is not initialised: the strict load fills every element.

    Args:
        multiply: does its matmuls.
        fp8: the weight is in 8 bits, with `scale` [N].
    """

    def __init__(self, in_features: int, out_features: int, multiply: Multiply, fp8: bool = False) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=E4M3 if fp8 else None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.scale = None
        if fp8:
            self.scale = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self._multiply = multiply

    def forward(self, x: Input, out: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]; into `out` where that is given."""
        if self.scale is None:
            return self._multiply(Gemm(plain(x), self.weight, self.bias, out=out))
        return self._multiply_scaled(scaled(x), self.scale, out)

    def curved(self, x: Input) -> Tensor | BeforeGelu:
        """x [..., K] -> GELU, in its tanh form, of [..., N]; which is left to the next layer where both are in fp8."""
        if self.scale is None:
            return self._multiply(Gemm(plain(x), self.weight, self.bias, gelu=True))
        return BeforeGelu(self.forward(x))

    def slot(self, first: int, rows: int) -> Tensor | Scaled:
        """Where `rows` rows of the weight, from `first` on, are filled in."""
        values = self.weight[first : first + rows]
        return values if self.scale is None else Scaled(values, self.scale[first : first + rows])

    def _multiply_scaled(self, x: Scaled, scale: Tensor, out: Tensor | None = None) -> Tensor:
        return self._multiply(Gemm(x.values, self.weight, self.bias, out=out, scales=(x.scale, scale)))


class LinearToTwo(Linear):
    """Two layers over one input, as one: the second's outputs, from `first` on, go through GELU."""

    def __init__(self, in_features: int, first: int, second: int, multiply: Multiply, fp8: bool = False) -> None:
        super().__init__(in_features, first + second, multiply, fp8)
        self._outputs = (first, second)

    def forward(self, x: Input) -> tuple[Tensor, Tensor | BeforeGelu]:  # type: ignore[override]
        """x [..., K] -> [..., first], [..., second], whose rows may lie apart."""
        if self.scale is not None:
            first, second = self._multiply_scaled(scaled(x), self.scale).split(self._outputs, dim=-1)
            return first, BeforeGelu(second)
        x, weights, biases = plain(x), self.weight.split(self._outputs), self.bias.split(self._outputs)
        return self._multiply.pair(Gemm(x, weights[0], biases[0]), Gemm(x, weights[1], biases[1], gelu=True))


class LinearOfTwo(Linear):
    """A layer over two inputs side by side. They are laid there only in 8 bits, when they are scaled; otherwise the
    second matmul adds to the first's result."""

    def forward(self, a: Tensor, b: Tensor | BeforeGelu) -> Tensor:  # type: ignore[override]
        """a [B, S, K1], b [B, S, K2], with K1 + K2 = K -> [B, S, N]."""
        if self.scale is not None:
            assert isinstance(b, BeforeGelu)
            return self._multiply_scaled(scaled_together(a, b), self.scale)
        first, second = self.weight.split((a.shape[-1], plain(b).shape[-1]), dim=1)
        out = self._multiply(Gemm(a, first, self.bias))
        return self._multiply(Gemm(plain(b), second, None, out=out, add=True))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int, multiply: Multiply, fp8: bool = False) -> None:
        super().__init__()
        self.up = Linear(dim, hidden, multiply, fp8)
        self.down = Linear(hidden, dim, multiply, fp8)

    def forward(self, x: Input) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down(self.up.curved(x))


def plain(x: Input) -> Tensor:
    """The input of a layer whose weight is in the model's dtype."""
    assert isinstance(x, Tensor)
    return x


def joined(layers: Sequence[Linear], inputs: Sequence[Tensor | Scaled]) -> Tensor:
    """Each input [B, S_i, K] through its own layer, the results side by side along the tokens: [B, S, N]."""
    shapes = [(x.values if isinstance(x, Scaled) else x).shape for x in inputs]
    lengths = [shape[1] for shape in shapes]
    out = layers[0].bias.new_empty(shapes[0][0], sum(lengths), len(layers[0].weight))
    for layer, x, part in zip(layers, inputs, out.split(lengths, dim=1), strict=True):
        layer(x, out=part)
    return out
