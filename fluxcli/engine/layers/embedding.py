"""Embeddings of the timestep, the guidance scale and the pooled text."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxcli.engine.layers.linear import Linear
from fluxcli.engine.matmul.gemm import Multiply


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_features: int, dim: int, multiply: Multiply) -> None:
        super().__init__()
        self.in_layer = Linear(in_features, dim, multiply)
        self.out_layer = Linear(dim, dim, multiply)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of t [N] -> [N, dim] in float32, cosines first; the form of DDPM with period 10,000."""
    exponents = -math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angles = t.float()[:, None] * exponents.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
