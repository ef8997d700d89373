"""Numbers in 8 bits: what `--quantization fp8` makes of weights and activations, and what a checkpoint may hold."""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn  # four bits of exponent, three of mantissa
E4M3_MAX = 448.0
LEAST = 2.0**-126  # the smallest scale, of a row of zeros: float32's smallest normal number


class Scaled(NamedTuple):
    """A tensor in 8 bits: values [..., K] in e4m3, and what each row of them is to be multiplied by, scale [...] in
    float32."""

    values: Tensor
    scale: Tensor

    def wide(self) -> Tensor:
        """What it stands for, [..., K] in float32."""
        return self.values.float() * self.scale[..., None]


Stored = Tensor | Scaled  # a weight, on disk or in a layer


def row_scaled(x: Tensor) -> Scaled:
    """x [..., K] with a scale for each row, which brings its largest value to e4m3's largest.

    A row of zeros stays one; infinities count as the largest number of x's dtype; a NaN makes its row NaN.
    """
    wide = bounded(x).float()
    scale = (wide.abs().amax(-1) * (1 / E4M3_MAX)).clip(min=LEAST)  # a division is another on CUDA
    return Scaled((wide * (1 / scale[..., None])).to(E4M3), scale)


def bounded(x: Tensor) -> Tensor:
    """x with its dtype's largest number for infinity."""
    most = torch.finfo(x.dtype).max
    return x.clip(-most, most)


def store(target: Stored, source: Stored) -> None:
    """Copies values into where they belong, in its format. Where both are in 8 bits, bit by bit."""
    if isinstance(target, Tensor):
        target.copy_(source if isinstance(source, Tensor) else source.wide())
        return
    if isinstance(source, Tensor):
        whole = source.new_ones(source.shape[:-1], dtype=torch.float32)
        source = Scaled(source, whole) if source.dtype == E4M3 else row_scaled(source)
    elif source.values.dtype != E4M3:
        source = row_scaled(source.wide())
    target.values.copy_(source.values)
    target.scale.copy_(source.scale)
