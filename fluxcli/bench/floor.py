"""The kernel floor: what a step would take if its matrix products and its attention were all of it.

The work is counted from the architecture and a shape alone; it is timed on random data, with torch's matrix products
and the fastest attention of the machine."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.core.records import ShapeKey
from fluxcli.engine.attention import backends
from fluxcli.engine.nets.flux1 import MLP_RATIO, FluxConfig
from fluxcli.engine.runtime.device import DTYPES
from fluxcli.engine.runtime.graphs import capture


class Product(NamedTuple):
    """A linear layer at work: [rows, in_features] times [in_features, out_features], and a bias."""

    rows: int
    in_features: int
    out_features: int


def products(config: FluxConfig, key: ShapeKey) -> list[Product]:
    """Every matrix product of one step, in an order in which a step may do them. What is done once for all steps of a
    batch (the text's embedding, the modulations) is none of them."""
    dim, up = config.inner_dim, MLP_RATIO * config.inner_dim
    img, txt = key.batch_size * _image_tokens(key), key.batch_size * key.text_length
    done = [Product(img, config.in_channels, dim)]
    for _ in range(config.num_layers):
        done += [Product(rows, dim, 3 * dim) for rows in (txt, img)]
        for rows in (img, txt):
            done += [Product(rows, dim, dim), Product(rows, dim, up), Product(rows, up, dim)]
    for _ in range(config.num_single_layers):
        done += [Product(img + txt, k, n) for k, n in ((dim, 3 * dim), (dim, up), (dim + up, dim))]
    return [*done, Product(img, dim, config.in_channels)]


def attention_shape(config: FluxConfig, key: ShapeKey) -> tuple[int, int, int, int]:
    """(batch, tokens, heads, head dim) of every block's attention."""
    tokens = _image_tokens(key) + key.text_length
    return key.batch_size, tokens, config.num_attention_heads, config.attention_head_dim


def flops(config: FluxConfig, key: ShapeKey) -> int:
    """Floating-point operations of one step: 2 * rows * in * out of every linear layer, and 4 * tokens^2 * D of every
    attention, image by image. The elementwise rest, under a hundredth of it at FLUX.1's size, is not counted."""
    batch, tokens, heads, head_dim = attention_shape(config, key)
    linear = sum(2 * rows * k * n for rows, k, n in products(config, key))
    return linear + (config.num_layers + config.num_single_layers) * batch * 4 * tokens**2 * heads * head_dim


def attention_ms(config: FluxConfig, key: ShapeKey, device: str, dtype: str) -> dict[str, float]:
    """Milliseconds of one attention for every backend that can run it here; empty on a CPU, which has but one."""
    if not device.startswith("cuda"):
        return {}
    return backends.milliseconds(*attention_shape(config, key), device, DTYPES[dtype])


def products_run(config: FluxConfig, key: ShapeKey, device: str, dtype: str) -> Callable[[], object]:
    """A call that does the products of one step. Layers of one size share their tensors: the products of the other
    sizes pass through the device's cache between two of them, as in a step."""
    tensors: dict[tuple[tuple[int, ...], float], Tensor] = {}

    def drawn(scale: float, *shape: int) -> Tensor:
        if (shape, scale) not in tensors:
            tensors[shape, scale] = torch.randn(shape, device=device, dtype=DTYPES[dtype]) * scale
        return tensors[shape, scale]

    layers = [(drawn(1, rows, k), drawn(k**-0.5, n, k), drawn(0.02, n)) for rows, k, n in products(config, key)]

    def run() -> None:
        for x, weight, bias in layers:
            F.linear(x, weight, bias)

    return _Captured(run) if device.startswith("cuda") else run


def attention_run(config: FluxConfig, key: ShapeKey, device: str, dtype: str, backend: str) -> Callable[[], object]:
    """A call that does the attentions of one step."""
    batch, tokens, heads, head_dim = attention_shape(config, key)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=DTYPES[dtype])

    def run() -> None:
        for _ in range(config.num_layers + config.num_single_layers):
            backends.attention(qkv, backend)

    return _Captured(run) if device.startswith("cuda") else run


class _Captured:
    """A CUDA graph of `run`, which it keeps, for the tensors the graph reads: launching is no part of the floor."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._graph, _ = capture(run)

    def __call__(self) -> None:
        self._graph.replay()


def _image_tokens(key: ShapeKey) -> int:
    return key._replace(batch_size=1, text_length=0).tokens()
