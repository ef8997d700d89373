"""The kernel floor: what a step would take if its matrix products and its attention were all of it.

The work is counted from the architecture and a shape alone; it is timed on random data, with torch's matrix products
(in 8 bits with the chip's own short sums, the fastest there are) and the fastest attention of the machine."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.core.records import ShapeKey
from fluxcli.engine.attention.backends import Attention
from fluxcli.engine.matmul.scaled import E4M3, Scaled, store
from fluxcli.engine.nets.flux1 import FluxConfig
from fluxcli.engine.runtime import stopwatch
from fluxcli.engine.runtime.device import DTYPES
from fluxcli.engine.runtime.graphs import Captured
from fluxcli.engine.runtime.tuner import FAULTS, Tuner
from fluxcli.models.flux1.targets import MLP_RATIO

_TURN_S = 0.05
_ROWS = 4096  # that are made smaller at once


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
    """Milliseconds of one attention for every way that can run it here; empty on a CPU, which has but one.

    By turns, each for long enough to heat the chip: timed one after the other, the first would win by its clock. As
    graphs, since a step launches nothing by itself.
    """
    if not device.startswith("cuda"):
        return {}
    runs: dict[str, stopwatch.Run] = {}
    for name, run in _attention(device, dtype).ways(_qkv(config, key, device, dtype)).items():
        try:
            runs[name] = Captured(run)
        except FAULTS:
            raise
        except Exception:  # installed, but not for this shape or this GPU
            continue
    times = stopwatch.interleaved(runs, device, _TURN_S)
    return {name: stopwatch.milliseconds(each) for name, each in times.items()}


def products_run(config: FluxConfig, key: ShapeKey, device: str, dtype: str, fp8: bool = False) -> Callable[[], object]:
    """A call that does the products of one step, those of blocks in 8 bits where `fp8`. Layers of one size share their
    tensors: the products of the other sizes pass through the device's cache between two of them, as in a step."""

    @cache
    def drawn(scale: float, *shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPES[dtype]) * scale

    @cache
    def eight(scale: float, rows: int, k: int) -> Scaled:
        whole = Scaled(torch.empty(rows, k, dtype=E4M3, device=device), torch.empty(rows, device=device))
        for first in range(0, rows, _ROWS):  # a batch's activations at once would take gigabytes beside themselves
            part = slice(first, first + _ROWS)
            store(Scaled(*(each[part] for each in whole)), drawn(scale, min(_ROWS, rows - first), k))
        return whole

    def plain_run(product: Product) -> Callable[[], object]:
        rows, k, n = product
        return partial(F.linear, drawn(1, rows, k), drawn(k**-0.5, n, k), drawn(0.02, n))

    def eight_run(product: Product) -> Callable[[], object]:
        rows, k, n = product
        (x, of_x), (weight, of_weight), bias = eight(1, rows, k), eight(k**-0.5, n, k), drawn(0.02, n)
        scales = of_x[:, None], of_weight[None]
        return partial(torch._scaled_mm, x, weight.t(), *scales, bias, out_dtype=bias.dtype, use_fast_accum=True)

    first, *blocks, last = products(config, key)
    runs = [plain_run(first), *map(eight_run if fp8 else plain_run, blocks), plain_run(last)]

    def run() -> None:
        for each in runs:
            each()

    return Captured(run) if device.startswith("cuda") else run


def attention_run(config: FluxConfig, key: ShapeKey, device: str, dtype: str, way: str) -> Callable[[], object]:
    """A call that does the attentions of one step, each by the same `way`: a name of `attention_ms`, or "sdpa"."""
    qkv = _qkv(config, key, device, dtype)
    attend = _attention(device, dtype).ways(qkv)[way]

    def run() -> None:
        for _ in range(config.num_layers + config.num_single_layers):
            attend()

    return Captured(run) if device.startswith("cuda") else run


def _attention(device: str, dtype: str) -> Attention:
    return Attention("auto" if device.startswith("cuda") else "sdpa", Tuner(device), device, DTYPES[dtype])


def _qkv(config: FluxConfig, key: ShapeKey, device: str, dtype: str) -> Tensor:
    batch, tokens, heads, head_dim = attention_shape(config, key)
    return torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=DTYPES[dtype])


def _image_tokens(key: ShapeKey) -> int:
    return key._replace(batch_size=1, text_length=0).tokens()
