"""A result of `fluxcli bench` as a table. A figure that was not measured is a dash."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fluxcli.bench.bench import errors
from fluxcli.core.records import ShapeKey

_NONE = "-"
_COMPONENTS = ("encode_s", "denoise_s", "decode_s", "save_s")


def text(result: Mapping[str, Any]) -> str:
    """The whole result for people."""
    parts = [headline(result), _aligned(step_rows(result)), _aligned(component_rows(result))]
    if parity := parity_line(result):
        parts.append(parity)
    starts = result.get("cold_start")
    if starts and "error" not in starts:
        parts.append(
            "\n".join(
                f"a new process, {name}: ready in {start['seconds']:.1f} s, {start['load_s']:.1f} s of it loading"
                for name, start in starts.items()
            )
        )
    parts += errors(result)
    return "\n\n".join(part for part in parts if part)


def headline(result: Mapping[str, Any]) -> str:
    versions = result["versions"]
    cuda = f" with CUDA {versions['cuda']}" if versions.get("cuda") else ""
    compiled = "" if result["compile"] else ", not compiled"
    quantized = f" and {result['quantization']}" if "quantization" in result else ""
    cache = ""
    if mask := result.get("mask"):
        cache = f", step cache {result['step_cache']}: {mask.count('1')} of {len(mask)} steps evaluated"
    return (
        f"{result['model']} on {result['device']}, {result['dtype']}{quantized}{compiled}{cache}, "
        f"torch {versions['torch']}{cuda}, diffusers {versions['diffusers']}, medians of {result['rounds']} rounds"
    )


def step_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One denoising step, a row a shape, under a header: milliseconds per image, and how they compare."""
    names = list(dict.fromkeys(name for row in result["shapes"] for name in row.get("peers", {})))
    reused = any("reused" in row for row in result["shapes"])
    header = ["batch", "size", "text", "attention", "ms per image and step", "% of floor", "TFLOP/s"]
    header += ["reused step"] if reused else []
    for name in names:
        header += [name, "ratio"]
    rows = [header]
    for row in result["shapes"]:
        cells = [*_shape(row), row.get("attention") or _NONE]
        cells += [_figure(row.get("ms_per_image_step"), ".2f"), _figure(row.get("percent_of_floor"), ".1f")]
        cells.append(_figure(row.get("tflops"), _significant))
        cells += [_figure(row.get("reused", {}).get("share"), ".2%")] if reused else []
        for name in names:
            peer = row.get("peers", {}).get(name, {})
            cells += [_figure(peer.get("ms_per_image_step"), ".2f"), _figure(row.get("ratio", {}).get(name), ".3f")]
        rows.append(cells)
    return rows


def component_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Whole images, a row a shape, under a header: seconds of each stage per image, rate and memory."""
    rows = [
        ["batch", "size", "text", "steps", *(name.replace("_s", " s") for name in _COMPONENTS), "images/s", "peak GiB"]
    ]
    rows[0] += ["cold s", "cached s"] if result.get("cold_start") else []
    for row in result["shapes"]:
        cells = [*_shape(row), str(result.get("steps", _NONE))]
        cells += [_figure(row.get("components", {}).get(name), ".4f") for name in _COMPONENTS]
        memory = row.get("peak_memory")
        cells += [_figure(row.get("images_per_s"), _significant), _figure(memory and memory / 2**30, ".1f")]
        if result.get("cold_start"):
            cells += [_figure(row.get("warm_up", {}).get(name), ".1f") for name in ("cold_s", "cached_s")]
        rows.append(cells)
    return rows


def parity_line(result: Mapping[str, Any]) -> str:
    found = result.get("parity")
    if not found or "error" in found:
        return ""
    key = ShapeKey.of(found)
    return (
        f"latents after {found['steps']} steps at {key}, relative error: ours to diffusers in {result['dtype']} "
        f"{found['ours_to_diffusers']:.2g}; to diffusers in float32 ours {found['ours_to_float32']:.2g}, "
        f"diffusers' own {found['diffusers_to_float32']:.2g}"
        + (f", torchao's {found['torchao_to_float32']:.2g}" if "torchao_to_float32" in found else "")
    )


def _shape(row: Mapping[str, Any]) -> list[str]:
    return [str(row["batch_size"]), f"{row['width']}x{row['height']}", str(row["text_length"])]


def _significant(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.0f}"


def _figure(value: float | None, form: str | Callable[[float], str]) -> str:
    if value is None:
        return _NONE
    return form(value) if callable(form) else format(value, form)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
