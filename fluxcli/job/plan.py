"""Rows -> batches. Pure: the same rows give the same plan, and nothing here knows files, prompts or devices."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fluxcli.core.records import Adapters, Group, ShapeKey
from fluxcli.core.step_cache import StepCache

ATTENTION = 18_400  # tokens of an image at which FLUX.1's attention costs as much as its matmuls

BatchSize = int | Callable[[Group], int]


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Row numbers that run together at `key`; rows beyond them, up to `key.batch_size`, are padding."""

    key: ShapeKey
    num_inference_steps: int
    rows: Sequence[int]
    adapters: Adapters = ()


@dataclass(frozen=True, slots=True)
class Plan:
    batches: tuple[PlannedBatch, ...]
    sizes: tuple[int, ...] | None = None

    def at_own_size(self, batch: PlannedBatch, rows: Sequence[int]) -> PlannedBatch:
        """Some of a batch's rows as a batch of their own."""
        key = batch.key._replace(batch_size=_size(len(rows), self.sizes))
        return PlannedBatch(key, batch.num_inference_steps, rows, batch.adapters)

    @property
    def swaps(self) -> int:
        """How often one engine changes its adapters, which at first are none."""
        sets = [(), *(batch.adapters for batch in self.batches)]
        return sum(before != after for before, after in pairwise(sets))

    def shapes(self) -> list[ShapeKey]:
        """Every shape the plan needs, largest first: the order to compile and capture them in."""
        return sorted({batch.key for batch in self.batches}, key=lambda key: (key.tokens(), key), reverse=True)

    def __iter__(self) -> Iterator[PlannedBatch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def bucket(text_tokens: int, text_lengths: Sequence[int]) -> int:
    """The smallest of `text_lengths` (ascending) that holds `text_tokens`; the largest where none does."""
    return next((length for length in text_lengths if text_tokens <= length), text_lengths[-1])


def work(group: Group, step_cache: StepCache) -> float:
    """What an image of a group costs, in tokens through the blocks' matmuls."""
    tokens = group._replace(branches=1).shape(1).tokens()
    return group.branches * tokens * (1 + tokens / ATTENTION) * step_cache.cost(group.num_inference_steps)


def size_of(batch_size: BatchSize, group: Group) -> int:
    return batch_size if isinstance(batch_size, int) else batch_size(group)


def padded_sizes(batch_size: int) -> tuple[int, ...]:
    """The batch sizes worth capturing a graph for: powers of two below `batch_size`, and itself."""
    sizes = [2**power for power in range(batch_size.bit_length()) if 2**power < batch_size]
    return (*sizes, batch_size)


def plan(
    groups: Iterable[Group],
    batch_size: BatchSize,
    sizes: Sequence[int] | None = None,
    prompts: Sequence[int] | None = None,
) -> Plan:
    """Batches of at most `batch_size` rows of one group each: one set of adapters after the other, none of them first,
    so that each is merged once; of each set the largest shapes first, rows in input order within a group.

    Args:
        groups: each row's group, in input order.
        batch_size: the same for all groups, or each group's own.
        sizes: the sizes a batch may run at, ascending and ending in the largest `batch_size`; a short last batch is
            padded up to the nearest. None runs every batch at its own size.
        prompts: each row's prompt, as the number of the first row that has it. Rows of one prompt then follow each
            other, so that the engine encodes it once.
    """
    rows_of: dict[Group, array[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, array("q")).append(row)
    batches = []
    met = dict.fromkeys(((), *(group.adapters for group in rows_of)))
    sets = {adapters: number for number, adapters in enumerate(met)}
    for group in sorted(rows_of, key=lambda group: (-sets[group.adapters], _work(group)), reverse=True):
        rows = rows_of[group]
        if prompts is not None:
            rows = array("q", sorted(rows, key=prompts.__getitem__))
        size = size_of(batch_size, group)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            key = group.shape(_size(len(part), sizes))
            batches.append(PlannedBatch(key, group.num_inference_steps, part, group.adapters))
    return Plan(tuple(batches), None if sizes is None else tuple(sizes))


def _size(rows: int, sizes: Sequence[int] | None) -> int:
    return rows if sizes is None else next(size for size in sizes if size >= rows)


def _work(group: Group) -> tuple[int, ...]:
    return (group.shape(1).tokens(), group.num_inference_steps, *group[:-1])  # adapters have no order
