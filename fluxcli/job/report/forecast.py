"""What a plan will take: from the times of the images that its directory has already, by shape."""

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from fluxcli.core.records import Group
from fluxcli.job.output.log import RowLog
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.output.sink import FileSink

_LONG = 2**25  # bytes of a manifest of some 40,000 rows
_FILES = 200  # images whose size is looked at: the last ones

Shape = tuple[int, int, int | None, int]


def forecast(directory: Path, groups: Iterable[Group], workers: int) -> dict[str, Any] | None:
    """Seconds and bytes for images of these groups on so many workers like the one that made the images there; None
    where none of them has a shape that was measured. `images` are those that have.

    A shape's step takes the mean of its last run; encoding and decoding the mean of theirs.
    """
    steps: dict[Shape, tuple[int, list[float]]] = {}
    last: deque[str] = deque(maxlen=_FILES)
    for row in _rows(directory / "manifest.jsonl"):
        if (taken := _seconds(row)) is not None:
            shape = (row.height, row.width, row.text_length, 1 if row.negative_prompt is None else 2)
            run, sums = steps.get(shape, (-1, []))
            if row.run != run:
                sums = [0.0, 0.0, 0.0]
                steps[shape] = (row.run, sums)
            for at, value in enumerate((taken[0] / row.num_inference_steps, taken[1], 1.0)):
                sums[at] += value
            last.append(row.file_name)
    images, seconds = 0, 0.0
    for group, count in Counter(groups).items():
        if (known := steps.get((group.height, group.width, group.text_length, group.branches))) is not None:
            step, rest, measured = known[1]
            images += count
            seconds += count * (group.num_inference_steps * step + rest) / measured
    if not images:
        return None
    return {
        "images": images,
        "seconds": round(seconds / workers, 1),
        "device_hours": round(seconds / 3600, 4),
        "bytes": round(images * _size(directory, last)),
    }


def _rows(path: Path) -> Iterator[ManifestRow]:
    """Every row; of a long manifest every so many."""
    log = RowLog(path, ManifestRow)
    every = 1 + (path.stat().st_size // _LONG if path.is_file() else 0)
    for number, line in log.lines():
        if number % every == 0 and b"\0" not in line:
            yield log.parse(number, line)


def _seconds(row: ManifestRow) -> tuple[float, float] | None:
    """An image's share of its batch: denoising, and what is before and after; None where its row does not say."""
    timing, parts = row.timing or {}, []
    for name in ("denoise_s", "encode_s", "decode_s"):
        part = timing.get(name)
        if not isinstance(part, int | float) or not math.isfinite(part) or part < 0:
            return None
        parts.append(float(part))
    return parts[0], parts[1] + parts[2]


def _size(directory: Path, names: Iterable[str]) -> float:
    """The mean size of some images, in bytes."""
    sizes = []
    with closing(FileSink(directory, "")) as sink:
        for name in names:
            with suppress(OSError):
                sizes.append(sink.stat(name).st_size)
    return sum(sizes) / max(1, len(sizes))
