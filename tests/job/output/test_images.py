"""Pictures carry prompt, seed and settings where viewers look for them."""

import io
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fluxcli.core.config import ImageFormat
from fluxcli.core.records import PromptRecord
from fluxcli.job.output.images import encode

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
