"""Images carry prompt, seed and settings where viewers look for them."""

import io
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fluxcli.core.config import ImageFormat
from fluxcli.core.records import PromptRecord
from fluxcli.job.output.images import comment_truncated, encode

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
SMOOTH = np.linspace(0, 255, 64 * 80 * 3).astype(np.uint8).reshape(64, 80, 3)
PROMPTS = ["a bench", 'naïve "café" 星 \N{GRINNING FACE}', "two\nlines", "x" * 5000, "Steps: 3, Seed: 4"]


def record(prompt: str = "a bench", guidance: float | None = 3.5) -> PromptRecord:
    return PromptRecord("x", prompt, 2**63 - 1, 80, 64, 28, guidance, 1)


def text_of(data: bytes) -> str:
    image = Image.open(io.BytesIO(data))
    if image.format == "PNG":
        return image.info["parameters"]
    assert struct.pack(">HH", 0x9286, 7) in data  # undefined, as EXIF has it
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["latin", "unicode", "lines", "long", "trap"])
def test_a_picture_carries_prompt_seed_and_settings(format: str, prompt: str) -> None:
    text = text_of(encode(PIXELS, ImageFormat(format), record(prompt), "some/model"))
    head, _, settings = text.rpartition("\n")
    assert head == prompt
    assert dict(part.split(": ") for part in settings.split(", ")) == {
        "Steps": "28",
        "Sampler": "Euler",
        "CFG scale": "1",
        "Distilled CFG Scale": "3.5",
        "Seed": str(2**63 - 1),
        "Size": "80x64",
        "Model": "some/model",
    }


def test_a_model_without_guidance_tells_of_none() -> None:
    text = text_of(encode(PIXELS, ImageFormat(), record(guidance=None), "m"))
    assert "Distilled" not in text
    assert "Seed: " in text


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_a_picture_is_of_its_format_and_holds_the_pixels(name: str, kind: str) -> None:
    image = Image.open(io.BytesIO(encode(SMOOTH, ImageFormat(name), record(), "m")))
    assert (image.format, image.mode, image.size) == (kind, "RGB", (80, 64))
    worst = np.abs(np.asarray(image).astype(int) - SMOOTH).max()
    assert worst == 0 if name == "png" else worst < 32


@pytest.mark.parametrize("name", ["jpg", "webp"])
def test_quality_counts(name: str) -> None:
    sizes = [len(encode(PIXELS, ImageFormat(name, quality), record(), "m")) for quality in (10, 50, 95)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_the_same_picture_is_the_same_bytes(format: str) -> None:
    first = encode(PIXELS, ImageFormat(format), record(), "m")
    assert encode(PIXELS.copy(), ImageFormat(format), record(), "m") == first
    assert encode(PIXELS, ImageFormat(format), replace(record(), seed=1), "m") != first


# A JPEG keeps its whole EXIF in one segment of 64 KiB.
LONG = {"latin": "x" * 36_000, "emoji": "\N{GRINNING FACE}" * 20_000, "odd": "a" + "\N{GRINNING FACE}" * 20_000}


@pytest.mark.parametrize("prompt", LONG.values(), ids=LONG)
def test_a_comment_too_long_for_a_jpeg_is_cut_and_keeps_its_settings(prompt: str) -> None:
    text = text_of(encode(PIXELS, ImageFormat("jpg"), record(prompt), "m"))
    head, _, settings = text.rpartition("\n")
    assert head.endswith("…")
    assert prompt.startswith(head[:-1])
    assert len(head.encode("utf-16-be")) > 65_000
    assert settings == text_of(encode(PIXELS, ImageFormat(), record(), "m")).rpartition("\n")[2]
    assert comment_truncated(ImageFormat("jpg"), record(prompt), "m")


def test_a_long_negative_prompt_is_cut_with_its_prompt() -> None:
    guided = replace(record(), negative_prompt=LONG["latin"], true_cfg_scale=2.5)
    text = text_of(encode(PIXELS, ImageFormat("jpg"), guided, "m"))
    assert text.startswith("a bench\nNegative prompt: xxx") and "x…\nSteps: " in text and "CFG scale: 2.5," in text
    assert comment_truncated(ImageFormat("jpg"), guided, "m")
    empty = replace(record(), negative_prompt="", true_cfg_scale=2.5)
    assert text_of(encode(PIXELS, ImageFormat(), empty, "m")).startswith("a bench\nSteps: ")


@pytest.mark.parametrize("format", ["png", "webp"])
def test_other_formats_hold_any_prompt(format: str) -> None:
    prompt = LONG["emoji"]
    assert text_of(encode(PIXELS, ImageFormat(format), record(prompt), "m")).startswith(prompt + "\n")
    assert not comment_truncated(ImageFormat(format), record(prompt), "m")


def test_a_comment_is_cut_only_where_it_must_be() -> None:
    def fits(length: int) -> bool:
        return not comment_truncated(ImageFormat("jpg"), record("x" * length), "m")

    edge = next(length for length in range(32_500, 32_700) if not fits(length))
    assert all(fits(length) for length in range(edge - 10, edge))
    for length in (edge - 1, edge):
        head = text_of(encode(PIXELS, ImageFormat("jpg"), record("x" * length), "m")).partition("\n")[0]
        assert head == ("x" * length if length < edge else "x" * (edge - 2) + "…")


@pytest.mark.parametrize(
    ("prompt", "chunk"), [("a bench", b"tEXt"), ("naïve café\n\ttab \x1b", b"tEXt"), ("星", b"iTXt"), ("“a”", b"iTXt")]
)
def test_png_text_is_of_the_kind_that_most_readers_know(prompt: str, chunk: bytes) -> None:
    data = encode(PIXELS, ImageFormat(), record(prompt), "m")
    (other,) = {b"tEXt", b"iTXt"} - {chunk}
    assert chunk + b"parameters\0" in data
    assert other not in data
    assert text_of(data).startswith(prompt + "\n")


def test_a_nul_does_not_end_the_text() -> None:
    assert text_of(encode(PIXELS, ImageFormat(), record("a\0b"), "m")).startswith("a b\n")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("my, model: v1", '"my, model: v1"'),
        ("random:flux-dev", '"random:flux-dev"'),
        ('a "b"', '"a \\"b\\""'),
        ("two\nlines", '"two\\nlines"'),
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_a_model_whose_name_holds_what_separates_is_quoted(name: str, written: str) -> None:
    for format in ("png", "jpg"):
        assert text_of(encode(PIXELS, ImageFormat(format), record(), name)).endswith(f", Model: {written}")
