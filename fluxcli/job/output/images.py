"""Pixels -> the bytes of a picture file, with prompt, seed and settings inside."""

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from fluxcli.core.config import ImageFormat
from fluxcli.core.records import PromptRecord

if TYPE_CHECKING:
    import numpy as np

# zlib's fastest level, looking for runs only: PNG's filters leave little else. On 1024x1024 pictures from smooth to
# noisy that takes 75 to 77 ms against 80 to 141, and the files are smaller or equal.
_PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_BYTE, _UNDEFINED = 1, 7  # TIFF's types


def encode(pixels: "np.ndarray[Any, Any]", format: ImageFormat, record: PromptRecord, model: str) -> bytes:
    """A PNG, JPEG or WebP of uint8 pixels [H, W, 3]. The same arguments give the same bytes."""
    image = Image.fromarray(pixels)
    text = parameters(record, model)
    out = io.BytesIO()
    if format.name == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", text)
        image.save(out, "PNG", pnginfo=info, **_PNG)
    elif format.name == "jpg":
        image.save(out, "JPEG", quality=format.quality, exif=_exif(text))
    else:
        image.save(out, "WEBP", quality=format.quality, exif=_exif(text))
    return out.getvalue()


def parameters(record: PromptRecord, model: str) -> str:
    """The settings in the form that AUTOMATIC1111's web UI writes and most viewers read."""
    settings = [f"Steps: {record.num_inference_steps}", "Sampler: Euler", "CFG scale: 1"]
    if record.guidance_scale is not None:
        settings.append(f"Distilled CFG Scale: {record.guidance_scale:.10g}")
    settings += [f"Seed: {record.seed}", f"Size: {record.width}x{record.height}", f"Model: {model}"]
    prompt = record.prompt.replace("\0", " ")  # a NUL would end the text early in most readers
    return f"{prompt}\n{', '.join(settings)}"


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    # EXIF 2.3, UserComment: an eight-byte character code, then the text in the byte order of the whole.
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    # Pillow knows no type for this tag and writes bytes; readers expect it undefined, as the standard has it.
    as_bytes, undefined = (struct.pack(">HH", _USER_COMMENT, kind) for kind in (_BYTE, _UNDEFINED))
    return exif.tobytes().replace(as_bytes, undefined, 1)
