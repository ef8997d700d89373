"""A program: the parquet file on standard input becomes JSON lines on standard output, its columns' names first. Its
reader is a large library of C++ and the file may be anybody's, so both stay in this process, with bounded memory. Knows
nothing of the rest of fluxcli."""

import json
import os
import resource
import signal
import sys
from typing import Any

MOST_MEMORY = 4 * 2**30
MOST_NAMES = 2**18  # bytes
_ROWS = 1024  # decoded at once
_BUFFER = 2**20  # bytes of a column read at once
_ENCODE = json.JSONEncoder(ensure_ascii=False, default=str).encode  # dates and decimals as text


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job's to answer, which then closes our output
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others set gigabytes of addresses aside
    try:
        _write(sys.stdin.buffer, sys.stdout.buffer)
    except MemoryError:
        sys.exit(f"its rows want more than {MOST_MEMORY // 2**30} GiB of memory")
    except Exception as error:  # whatever a library raises on bytes that are not what they should be
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


def _write(file: Any, out: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    pa.set_cpu_count(1)
    source = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
    names = [field.name for field in source.schema_arrow if not _holds_bytes(field.type)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two columns are named {twice!r}")
    header = _line(names)
    if len(header) > MOST_NAMES:
        raise ValueError(f"the names of its columns take more than {MOST_NAMES // 2**10} KiB")
    out.write(header)
    for batch in source.iter_batches(batch_size=_ROWS, columns=names, use_threads=False):
        for row in zip(*(_values(batch.column(name)) for name in names), strict=True):
            out.write(_line(dict(zip(names, row, strict=True))))
    out.flush()


def _holds_bytes(kind: Any) -> bool:
    """Whether values of this type are no text, or hold some that are not: images, embeddings as blobs."""
    from pyarrow import types

    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def _values(column: Any) -> list[Any]:
    """A column's values; text that is not UTF-8 as the bytes it is, for the one row to fail."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [each and each.decode("utf-8", "surrogateescape") for each in column.cast("binary").to_pylist()]
    return values


def _line(value: Any) -> bytes:
    return f"{_ENCODE(value)}\n".encode("utf-8", "surrogateescape")


if __name__ == "__main__":
    main()
