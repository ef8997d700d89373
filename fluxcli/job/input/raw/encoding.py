"""What a file's first bytes say of its encoding: UTF-8, or UTF-16 and UTF-32 by their marks, which are rewritten as
UTF-8; anything else is refused whole, with its first bad byte and what to do."""

import codecs
import unicodedata
from collections.abc import Iterator

from fluxcli.core.errors import InputError

SAMPLE = 2**16  # bytes looked at
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_FOREIGN = (
    (b"\x1f\x8b\x08", "gzip", "unpack it: gzip -dc FILE | fluxcli batch - --input-format ..."),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it: zstd -dc FILE | fluxcli batch - --input-format ..."),
    (b"\xfd7zXZ\0", "xz", "unpack it: xz -dc FILE | fluxcli batch - --input-format ..."),
    (b"BZh91AY&SY", "bzip2", "unpack it: bzip2 -dc FILE | fluxcli batch - --input-format ..."),
    (b"PAR1", "parquet", "give it as a file, or write its rows as .jsonl or .csv"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "save the sheet as CSV UTF-8, or unpack it"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook", "save the sheet as CSV UTF-8"),
)
_LEAST = 4  # NULs that make an encoding likely: one may be a row's own fault


def mark_of(sample: bytes) -> tuple[bytes, str] | None:
    """The byte order mark that a file begins with and its encoding; None for UTF-8, with a mark or without."""
    return next((each for each in _MARKS if sample.startswith(each[0])), None)


def refuse_foreign(name: str, sample: bytes) -> None:
    """Refuses what is evidently no UTF-8 text by its first bytes.

    Raises:
        InputError: naming the kind of file, its first bad byte, and what to do.
    """
    for magic, kind, remedy in _FOREIGN:
        if sample.startswith(magic):
            raise InputError(f"{name}: is {kind}, not text ({_first_bad(sample)}); {remedy}")
    for encoding in ("utf-16-le", "utf-16-be"):
        if _reads_as(sample, encoding):
            raise InputError(
                f"{name}: is {encoding.upper()[:-3]} without a byte order mark, not UTF-8 ({_first_bad(sample)}); "
                f"save it as UTF-8: iconv -f {encoding.upper().replace('-LE', 'LE').replace('-BE', 'BE')} -t UTF-8"
            )


def as_utf8(name: str, blocks: Iterator[bytes], mark: bytes, encoding: str) -> Iterator[bytes]:
    """The text after its mark in UTF-8.

    Raises:
        InputError: naming the first byte that is none of the encoding's.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    done = 0  # bytes handed to the decoder, less those it holds back
    try:
        for block in blocks:
            held = len(decoder.getstate()[0])
            done, block = (done, block) if done else (len(mark), block[len(mark) :])
            start = done - held
            yield decoder.decode(block).encode()
            done += len(block)
        start = done - len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise InputError(
            f"{name}: is not valid {encoding.upper()[:-3]}, as its first bytes say: byte {start + error.start} "
            f"(0x{bad:02x}); save it as UTF-8"
        ) from error


def bad_byte(error: UnicodeDecodeError) -> str:
    """What is wrong with a line that is not UTF-8, for its message."""
    return f"byte {error.start} of the line is 0x{error.object[error.start]:02x}; save the file as UTF-8"


def _reads_as(sample: bytes, encoding: str) -> bool:
    """Whether NULs are on one side of a pair above all, and the pairs are lines of characters that are in use."""
    side = 1 if encoding == "utf-16-le" else 0
    nulls = sample[side::2].count(0)
    if nulls < max(_LEAST, 2 * sample[1 - side :: 2].count(0)):
        return False
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeDecodeError:
        return False
    ends = any(end in text for end in "\r\n") or nulls * 4 > len(sample)
    return ends and all(char in "\t\r\n" or unicodedata.category(char) not in ("Cc", "Cn", "Co") for char in set(text))


def _first_bad(sample: bytes) -> str:
    try:
        sample.decode()
        end = len(sample)
    except UnicodeDecodeError as error:
        end = error.start
    controls = (at for at, byte in enumerate(sample[:end]) if byte < 32 and byte not in b"\t\n\f\r")
    at = next(controls, end)
    return f"byte {at} is 0x{sample[at]:02x}" if at < len(sample) else "its first bytes say so"
