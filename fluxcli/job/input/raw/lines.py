"""Lines of a file in bounded memory, at their offsets, whatever ends them."""

import codecs
from collections.abc import Iterator

from fluxcli.job.input.raw.storage import BLOCK, Bytes

MAX_LINE = 10 * 2**20  # bytes


def lines(file: Bytes, offset: int, block: int = BLOCK) -> Iterator[tuple[int, int, bytes | None]]:
    """(start, end, line) of each line of a file from `offset` on.

    LF, CRLF and CR end a line and stay at its end; byte order marks at its start, as files put together have them, are
    left out. None stands for a line over MAX_LINE, which is never held whole. Reads at positions of its own, so that
    others may read the file in between.
    """
    rest, position = b"", offset
    long_from: int | None = None  # where a line over MAX_LINE started
    while True:
        data = file.pread(block, position)
        position += len(data)
        pieces = (rest + data).splitlines(keepends=True)
        # Only LF is sure to be a line's whole end: another may follow CR.
        rest = pieces.pop() if data and not pieces[-1].endswith(b"\n") else b""
        for piece in pieces:
            start, offset = offset, offset + len(piece)
            if long_from is not None:
                start, long_from = long_from, None
                yield start, offset, None
            elif len(piece) > MAX_LINE:
                yield start, offset, None
            else:
                while piece.startswith(codecs.BOM_UTF8):
                    piece = piece[len(codecs.BOM_UTF8) :]
                yield start, offset, piece
        if not data:
            if long_from is not None:
                yield long_from, offset, None
            return
        if len(rest) > MAX_LINE:
            long_from = offset if long_from is None else long_from
            kept = rest[-1:] if rest.endswith(b"\r") else b""
            offset, rest = offset + len(rest) - len(kept), kept


def count_ends(text: bytes) -> int:
    """How many lines end in `text`, which does not end between the CR and the LF of one."""
    return text.count(b"\n") + text.count(b"\r") - text.count(b"\r\n")


def too_long() -> str:
    return f"the line is longer than {MAX_LINE // 2**20} MiB"
