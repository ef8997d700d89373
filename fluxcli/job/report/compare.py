"""`fluxcli compare`: how far apart the images of two jobs over the same rows are, image by image."""

import hashlib
import heapq
import math
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fluxcli.core.errors import JobError
from fluxcli.job.output import sound
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.output.sink import FileSink
from fluxcli.job.report import distance
from fluxcli.job.report.distance import Pixels
from fluxcli.job.report.pairs import EXAMPLES, NAMES, Joined, Told, differing
from fluxcli.job.run.progress import Progress

WORST = 20  # pairs that are shown
PROMPT = 4096  # characters of a prompt that a pair holds: a manifest may be anybody's
_WORKERS = min(16, os.cpu_count() or 1)  # decoders and numpy let go of the interpreter

# LPIPS of two images of one size: a network's matter, so it comes from outside. Called from several threads.
Perceptual = Callable[[Pixels, Pixels], float]


@dataclass(frozen=True, slots=True)
class Pair:
    """One row's two images and how far they are apart.

    Attributes:
        prompt: its beginning, of one longer than `PROMPT` characters.
        file_a, file_b: relative to their jobs' directories.
        psnr: in dB; infinite where all pixels are equal.
        lpips: None where it is not measured.
        differs: the settings of the row that are others in B, steps and the like.
    """

    id: str
    prompt: str
    seed: int
    file_a: str
    file_b: str
    psnr: float
    ssim: float
    lpips: float | None
    differs: tuple[str, ...]


class Left(NamedTuple):
    """A row that is not compared, and why."""

    id: str
    reason: str


class Spread:
    """Values of one measure over all pairs, eight bytes each."""

    def __init__(self) -> None:
        self._all = array("d")

    def add(self, value: float) -> None:
        self._all.append(value)

    def __len__(self) -> int:
        return len(self._all)

    def mean(self) -> float | None:
        """Of the finite values: an infinite PSNR has no place in a mean, and those pairs are counted apart."""
        finite = [value for value in self._all if math.isfinite(value)]
        return math.fsum(finite) / len(finite) if finite else None

    def percentiles(self, wanted: tuple[int, ...]) -> dict[int, float]:
        """Each a value of a pair, the nearest in rank: between a number and infinity lies nothing."""
        ordered = sorted(self._all)
        return {each: ordered[round((len(ordered) - 1) * each / 100)] for each in wanted} if ordered else {}


@dataclass
class Comparison:
    """Two jobs compared.

    `identical` pairs have equal pixels, and are among the `compared`. `not_compared` are rows by reason: only_in_a,
    only_in_b, repeated (an id once more), other_prompt, other_seed, other_size, too_small for SSIM's window; and, with
    _a or _b behind it, bad_row, missing_image, altered_image, undecodable_image or wrong_size, as `verify` means them.
    `rows_with_other` counts compared rows by the settings in which the two differ. `worst` are the pairs of the lowest
    PSNR that is finite, lowest first.
    """

    joined: Joined
    compared: int = 0
    identical: int = 0
    not_compared: dict[str, Told] = field(default_factory=dict)
    rows_with_other: "Counter[str]" = field(default_factory=Counter)
    psnr: Spread = field(default_factory=Spread)
    ssim: Spread = field(default_factory=Spread)
    lpips: Spread = field(default_factory=Spread)
    worst: list[Pair] = field(default_factory=list)


def compare(
    a: Path,
    b: Path,
    perceptual: Perceptual | None = None,
    worst: int = WORST,
    each: Callable[[Pair], None] = lambda pair: None,
) -> Comparison:
    """Measures every pair of images that two jobs made of one row: same id, prompt, seed and size.

    Both directories may be anyone's, and are left as they are; a job that is running is seen as it stands now.

    Args:
        worst: how many pairs the result holds.
        each: given every pair, in the order of A's manifest: what a page of them is made from.

    Raises:
        JobError: one of them is no job or has no image, no row could be compared, or the disk fails.
    """
    try:
        with closing(Joined(a, b)) as joined, Progress(joined.common) as progress:
            comparison = _Comparing(Comparison(joined), worst, each)
            progress.start()
            for measured in _measured(joined, perceptual):
                progress.advance(*comparison.take(measured))
            return comparison.finished()
    except OSError as error:
        raise JobError(f"{error.filename or a}: cannot be read: {error.strerror}") from error


class _Comparing:
    """A comparison that grows pair by pair."""

    def __init__(self, comparison: Comparison, worst: int, each: Callable[[Pair], None]) -> None:
        self._comparison, self._worst, self._each = comparison, worst, each
        self._heap: list[tuple[float, int, Pair]] = []  # the best of the worst first
        joined, skipped = comparison.joined, comparison.not_compared
        found = {
            "only_in_a": joined.only_a,
            "only_in_b": joined.only_b,
            "repeated": Told(joined.repeated, []),
            "bad_row_a": Told(joined.a.unreadable, []),
            "bad_row_b": Told(joined.b.unreadable, []),
        }
        skipped.update({reason: told for reason, told in found.items() if told.rows})

    def take(self, measured: Pair | Left) -> tuple[int, int]:
        """Takes in a pair, or a row that is left out; how many were compared and how many not."""
        comparison = self._comparison
        if isinstance(measured, Left):
            rows, ids = comparison.not_compared.get(measured.reason, Told(0, []))
            ids = [*ids, measured.id] if len(ids) < EXAMPLES else ids
            comparison.not_compared[measured.reason] = Told(rows + 1, ids)
            return 0, 1
        comparison.compared += 1
        comparison.psnr.add(measured.psnr)
        comparison.ssim.add(measured.ssim)
        if measured.lpips is not None:
            comparison.lpips.add(measured.lpips)
        others = comparison.rows_with_other
        others.update(name for name in measured.differs if name in others or len(others) < NAMES)
        if measured.psnr == math.inf:
            comparison.identical += 1
        elif self._worst:
            push = heapq.heappush if len(self._heap) < self._worst else heapq.heappushpop
            push(self._heap, (-measured.psnr, -comparison.compared, measured))
        self._each(measured)
        return 1, 0

    def finished(self) -> Comparison:
        comparison = self._comparison
        if not comparison.compared:
            reasons = ", ".join(f"{reason} {told.rows}" for reason, told in comparison.not_compared.items())
            a, b = comparison.joined.a.directory, comparison.joined.b.directory
            raise JobError(f"{a} and {b}: no row can be compared ({reasons})")
        comparison.worst = [pair for _, _, pair in sorted(self._heap, reverse=True)]
        return comparison


def _measured(joined: Joined, perceptual: Perceptual | None) -> Iterator[Pair | Left]:
    """Each row that both jobs have; a few are measured ahead."""
    readers = ThreadPoolExecutor(_WORKERS)
    try:
        ahead: deque[Future[Pair | Left]] = deque()
        for place in joined.places():
            ahead.append(readers.submit(_measure, joined, place, perceptual))
            if len(ahead) > 2 * _WORKERS:
                yield ahead.popleft().result()
        for measured in ahead:
            yield measured.result()
    finally:
        readers.shutdown(cancel_futures=True)


class _Unusable(Exception):
    """There is no image that could be compared; the message is the reason."""


def _measure(joined: Joined, place: tuple[int, int], perceptual: Perceptual | None) -> Pair | Left:
    a, b = joined.a.row(place[0]), joined.b.row(place[1])
    if a.prompt != b.prompt:
        return Left(a.id, "other_prompt")
    if a.seed != b.seed:
        return Left(a.id, "other_seed")
    if (a.width, a.height) != (b.width, b.height):
        return Left(a.id, "other_size")
    if min(a.width, a.height) < distance.WINDOW:
        return Left(a.id, "too_small")
    try:
        with _file(joined.a.sink, a, "a") as file_a, _file(joined.b.sink, b, "b") as file_b:
            left = _pixels(file_a, a, "a")
            right = left if a.sha256 == b.sha256 else _pixels(file_b, b, "b")  # both files have it
    except _Unusable as unusable:
        return Left(a.id, str(unusable))
    psnr = math.inf if left is right else distance.psnr(left, right)
    equal = psnr == math.inf
    ssim = 1.0 if equal else distance.ssim(left, right)
    lpips = None if perceptual is None else 0.0 if equal else perceptual(left, right)
    differs = tuple(differing(a, b))
    return Pair(a.id, a.prompt[:PROMPT], a.seed, a.file_name, b.file_name, psnr, ssim, lpips, differs)


def _file(sink: FileSink, row: ManifestRow, side: str) -> BinaryIO:
    """The file of a row's image, as the job made it."""
    try:
        file = os.fdopen(sink.open(row.file_name), "rb")
    except OSError as error:
        raise _Unusable(f"missing_image_{side}") from error
    try:
        if os.fstat(file.fileno()).st_size > sound.LARGEST:
            raise _Unusable(f"undecodable_image_{side}")
        if hashlib.file_digest(file, "sha256").hexdigest() != row.sha256:
            raise _Unusable(f"altered_image_{side}")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _pixels(file: BinaryIO, row: ManifestRow, side: str) -> Pixels:
    try:
        pixels = sound.pixels_of(file)
    except sound.Unsound as error:
        raise _Unusable(f"undecodable_image_{side}") from error
    if pixels.shape[:2] != (row.height, row.width):
        raise _Unusable(f"wrong_size_{side}")
    return pixels
