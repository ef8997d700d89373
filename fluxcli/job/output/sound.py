"""Whether bytes on disk are a whole image: stricter than decoders, which forgive a damaged end."""

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from PIL import Image

if TYPE_CHECKING:
    import numpy as np

LARGEST = 2**28  # bytes: 4096x4096 pixels raw are 50 MB
_MOST_PIXELS = 4096 * 4096
_FORMATS = ("PNG", "JPEG", "WEBP")
_PNG = b"\x89PNG\r\n\x1a\n"
T = TypeVar("T")


class Unsound(ValueError):
    """No whole image. The message says why."""


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Width and height of the image in a file, decoded to its last pixel.

    Raises:
        Unsound: it is damaged, cut short, or no PNG, JPEG or WebP at all.
    """
    return _decoded(file, lambda image: image.size)


def pixels_of(file: BinaryIO) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """The pixels of the image in a file, uint8 [H, W, 3].

    Raises:
        Unsound: as `size_of`, or it is larger than an image of a job can be.
    """
    return _decoded(file, _pixels)


def _decoded(file: BinaryIO, take: Callable[[Image.Image], T]) -> T:
    data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise Unsound("too large to be an image of a job")
    file.seek(0)
    try:
        with Image.open(file, formats=_FORMATS) as image:
            _check_end(data)
            if image.width * image.height <= _MOST_PIXELS:  # else it is no image of a job whatever its pixels
                image.load()
            return take(image)
    except (Unsound, MemoryError):
        raise
    except Exception as error:  # a decoder on hostile bytes may raise anything
        raise Unsound(f"cannot be decoded: {type(error).__name__}") from error


def _pixels(image: Image.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    import numpy as np

    if image.width * image.height > _MOST_PIXELS:
        raise Unsound(f"is {image.width}x{image.height}, larger than an image of a job can be")
    return np.asarray(image.convert("RGB"))


def _check_end(data: bytes) -> None:
    if data.startswith(_PNG):
        _check_chunks(data)
    elif data.startswith(b"RIFF"):
        if int.from_bytes(data[4:8], "little") + 8 > len(data):
            raise Unsound("ends early")
    elif not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise Unsound("ends early")


def _check_chunks(data: bytes) -> None:
    view, at = memoryview(data), len(_PNG)
    while True:
        length, kind = int.from_bytes(view[at : at + 4], "big"), bytes(view[at + 4 : at + 8])
        end = at + 8 + length
        if end + 4 > len(data):
            raise Unsound("ends early")
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise Unsound("a check sum in it is wrong")
        if kind == b"IEND":
            return
        at = end + 4
