"""How fast a GPU multiplies and attends in 8 bits at FLUX.1's shapes, and how exactly:

    python -m jobs.bench.fp8_speed matmuls --batch-size 16 -o matmuls.json
    python -m jobs.bench.fp8_speed attention --batch-size 16 -o attention.json

Every way by turns, on random data, as captured graphs; a way that cannot run here is told with its reason.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxcli.bench.floor import attention_shape, products
from fluxcli.core.errors import first_line
from fluxcli.core.records import ShapeKey
from fluxcli.engine.attention.backends import Attention
from fluxcli.engine.matmul.gemm import Backend, Gemm
from fluxcli.engine.matmul.quack import Quack
from fluxcli.engine.matmul.scaled import E4M3, E4M3_MAX, Scaled, row_scaled
from fluxcli.engine.matmul.torch_ import Torch
from fluxcli.engine.nets.flux1 import FluxConfig
from fluxcli.engine.runtime import stopwatch
from fluxcli.engine.runtime.graphs import Captured
from fluxcli.engine.runtime.tuner import Tuner
from fluxcli.models.checkpoints import resolve
from jobs.bench.fp8 import error, with_outliers

DEVICE = "cuda"
TURN_S = 0.1
CHECKED = 1024  # rows of a result that are held to float32
BLOCK = 128
MODEL = "random:flux-dev"

Ways = dict[str, Callable[[], Tensor]]


def shape_of(batch_size: int) -> tuple[FluxConfig, ShapeKey]:
    return FluxConfig.from_json(resolve(MODEL).transformer), ShapeKey(batch_size, 1024, 1024, 512)


def matmuls(batch_size: int) -> dict[str, Any]:
    """Milliseconds and relative error of each way at each shape of a block's, and how many a step does."""
    _, *blocks, _ = products(*shape_of(batch_size))
    return {
        f"{rows} x {k} x {n}": {"a_step": count} | matmul(rows, k, n)
        for (rows, k, n), count in sorted(Counter(blocks).items())
    }


def matmul(rows: int, k: int, n: int) -> dict[str, Any]:
    x = with_outliers_here(rows, k)
    weight, bias = drawn(n, k) * k**-0.5, drawn(n) * 0.02
    few = slice(0, min(rows, CHECKED))
    truth = F.linear(x[few].float(), weight.float(), bias.float())
    eight, of_weight = row_scaled(x), row_scaled(weight)
    rounded = F.linear(Scaled(*(each[few] for each in eight)).wide(), of_weight.wide(), bias.float())
    ways: Ways = {}
    for backend in backends():
        plain = Gemm(x, weight, bias)
        scaled = Gemm(eight.values, of_weight.values, bias, scales=(eight.scale, of_weight.scale))
        for gemm, kind in ((plain, "bfloat16"), (scaled, "fp8")):
            for way in backend.ways((gemm,)):
                ways[f"{kind} {way}"] = lambda way=way, gemm=gemm, backend=backend: backend.run(way, (gemm,))[0]
    scales = eight.scale[:, None], of_weight.scale[None]
    ways["fp8 torch, sums in float32"] = partial(
        torch._scaled_mm, eight.values, of_weight.values.t(), *scales, bias, out_dtype=bias.dtype
    )
    ways["fp8 torch in blocks of 128"] = in_blocks(x, weight)
    times, told = timed(ways)
    found: dict[str, Any] = {name: {"cannot": why} for name, why in told.items()}
    for name, ms in times.items():
        made = ways[name]()[few].float()
        sums = error(made, rounded) if name.startswith("fp8") else None
        found[name] = {"ms": ms, "tflops": 2 * rows * k * n / ms / 1e9, "error": error(made, truth)}
        found[name]["error_of_sums"] = sums
    return found


def in_blocks(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """cuBLASLt's, without a bias: a scale for 1 x 128 numbers of x and for 128 x 128 of the weight."""
    parts = x.float().unflatten(-1, (-1, BLOCK))
    of_x = parts.abs().amax(-1).clip(min=1e-30) / E4M3_MAX
    values = (parts / of_x[..., None]).flatten(-2).to(E4M3)
    squares = weight.float().unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    of_weight = squares.abs().amax((1, 3)).clip(min=1e-30) / E4M3_MAX
    stored = (squares / of_weight[:, None, :, None]).flatten(-2).flatten(0, 1).to(E4M3)
    kinds = torch.nn.functional.ScalingType
    return partial(
        F.scaled_mm, values, stored.t(), of_x.t().contiguous().t(), kinds.BlockWise1x128, of_weight.t(),
        kinds.BlockWise128x128, output_dtype=x.dtype,
    )  # fmt: skip


def attention(batch_size: int) -> dict[str, Any]:
    """Milliseconds and relative error of each way to attend, in bfloat16 and by cuDNN in 8 bits."""
    batch, tokens, heads, head_dim = attention_shape(*shape_of(batch_size))
    qkv = drawn(batch, tokens, 3, heads, head_dim)
    ways: Ways = dict(Attention("auto", Tuner(DEVICE), DEVICE, qkv.dtype).ways(qkv))
    told = {}
    try:
        ways["cudnn fp8"] = cudnn_in_8_bits(qkv)
    except Exception as why:
        told["cudnn fp8"] = {"cannot": first_line(why)}
    few = qkv[:1].float()
    q, k, v = (each.transpose(1, 2) for each in few.unbind(2))
    truth = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    times, cannot = timed(ways)
    found = {
        name: {
            "ms": ms,
            "tflops": 4 * batch * tokens**2 * heads * head_dim / ms / 1e9,
            "error": error(wide(ways[name](), qkv)[:1], truth),
        }
        for name, ms in times.items()
    }
    return found | {name: {"cannot": why} for name, why in cannot.items()} | told


def cudnn_in_8_bits(qkv: Tensor) -> Callable[[], Tensor]:
    """cuDNN's attention in e4m3 with a scale a tensor, its result too: all that it has for Hopper. What rounding
    qkv takes is not in it."""
    import cudnn

    kinds, (batch, tokens, _, heads, head_dim) = cudnn.data_type, qkv.shape
    most = [each.abs().amax().float() for each in qkv.unbind(2)]
    eight = torch.stack([(x.float() * (E4M3_MAX / m)).to(E4M3) for x, m in zip(qkv.unbind(2), most, strict=True)], 2)
    out = torch.empty(batch, tokens, heads, head_dim, dtype=E4M3, device=qkv.device)
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        handle=handle, io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
    )  # fmt: skip
    values = {}
    inputs = []
    for x in eight.unbind(2):
        x = x.transpose(1, 2)
        inputs.append(graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=kinds.FP8_E4M3))
        values[inputs[-1]] = x
    ones = [torch.tensor(1 / E4M3_MAX, device=qkv.device), torch.tensor(E4M3_MAX, device=qkv.device)]
    of_out = E4M3_MAX / most[2]  # no value is further from zero than the largest of v
    for number in (*(m / E4M3_MAX for m in most), *ones, of_out):
        inputs.append(graph.tensor(dim=[1] * 4, stride=[1] * 4, data_type=kinds.FLOAT))
        values[inputs[-1]] = number.view(1, 1, 1, 1)
    result, _, _, _ = graph.sdpa_fp8(*inputs, attn_scale=head_dim**-0.5, generate_stats=False)
    heads_first = out.transpose(1, 2)
    result.set_output(True).set_dim(list(heads_first.shape)).set_stride(list(heads_first.stride()))
    result.set_data_type(kinds.FP8_E4M3)
    values[result] = heads_first
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=qkv.device)

    def run() -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(values, workspace, handle=handle)
        return out

    return run


def wide(result: Tensor, qkv: Tensor) -> Tensor:
    scale = qkv[:, :, 2].abs().amax().float() / E4M3_MAX if result.dtype == E4M3 else 1
    return result.float() * scale


def timed(ways: Ways) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each that runs; why each other does not."""
    runs: dict[str, stopwatch.Run] = {}
    told = {}
    for name, way in ways.items():
        try:
            runs[name] = Captured(way)
        except Exception as why:
            told[name] = first_line(why)
    times = stopwatch.interleaved(runs, DEVICE, TURN_S)
    return {name: stopwatch.milliseconds(each) for name, each in times.items()}, told


def backends() -> list[Backend]:
    quack = Quack.here(DEVICE)
    return [Torch(), *([quack] if quack else [])]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def with_outliers_here(rows: int, channels: int) -> Tensor:
    with torch.device(DEVICE):
        return with_outliers(rows, channels).bfloat16()


def table(found: dict[str, Any]) -> str:
    """Of `matmuls`: what each way takes, and how exact it is."""
    lines = []
    for name, shape in found.items():
        ways = {way: each for way, each in shape.items() if isinstance(each, dict)}
        lines.append(f"{name}, {shape['a_step']} a step")
        for way, each in ways.items():
            if "ms" in each:
                sums = "" if each["error_of_sums"] is None else f", of its sums {each['error_of_sums']:.2e}"
                figures = f"{each['ms']:9.3f} ms {each['tflops']:6.0f} TFLOP/s, error {each['error']:.4f}{sums}"
            else:
                figures = each["cannot"]
            lines.append(f"  {way:28} {figures}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("matmuls", "attention"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("-o", "--output")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        found = (matmuls if args.what == "matmuls" else attention)(args.batch_size)
    if args.output:
        with open(args.output, "w") as file:
            json.dump(found, file, indent=1)
    if args.what == "matmuls":
        print(table(found))
    else:
        for way, each in found.items():
            print(way, each)


if __name__ == "__main__":
    main()
