"""One pass over the input: check every row, count its tokens, leave out what is done. What remains is a compact table
of numbers, so that a million rows need megabytes, and prompts are read again when their batch comes up."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from fluxcli.core.config import RowDefaults
from fluxcli.core.errors import RowError
from fluxcli.core.records import Failure, Group, PromptRecord
from fluxcli.job.input.read import PromptFile, check_row
from fluxcli.job.plan import bucket

TokenCounter = Callable[[list[str]], list[int]]
Status = Callable[[PromptRecord], str | None]
_CHUNK = 1024  # prompts tokenized at once


@dataclass
class Intake:
    """The images still to make, as parallel arrays over image numbers, and what the pass found besides."""

    source: PromptFile
    defaults: RowDefaults
    text_lengths: tuple[int, ...]
    groups: list[Group] = field(default_factory=list)
    rows: int = 0
    done: int = 0
    truncated: int = 0
    prompts: "array[int]" = field(default_factory=lambda: array("q"))  # of each image: the first with its prompt
    failures: list[Failure] = field(default_factory=list)
    _offset: "array[int]" = field(default_factory=lambda: array("q"))
    _index: "array[int]" = field(default_factory=lambda: array("q"))
    _line: "array[int]" = field(default_factory=lambda: array("q"))
    _copy: "array[int]" = field(default_factory=lambda: array("i"))
    _tokens: "array[int]" = field(default_factory=lambda: array("i"))

    def records(self, images: Sequence[int]) -> list[PromptRecord]:
        """The records of these images, read from the input again."""
        return [self._record(image) for image in images]

    def text_tokens(self) -> Iterator[tuple[int, int]]:
        """(T5 tokens, bucket) of each image to make."""
        return zip(self._tokens, (group.text_length for group in self.groups), strict=True)

    def drop(self, unwanted: Callable[[str | None, int], bool]) -> int:
        """Leaves out the images and failures for which `unwanted(id, line)` holds; returns how many."""
        keep = [image for image, record in enumerate(self._all_records()) if not unwanted(record.id, record.line)]
        failures = [failure for failure in self.failures if not unwanted(failure.id, failure.line)]
        dropped = len(self.groups) - len(keep) + len(self.failures) - len(failures)
        self.failures = failures
        self.groups = [self.groups[image] for image in keep]
        for name in ("prompts", "_offset", "_index", "_line", "_copy", "_tokens"):
            column = getattr(self, name)
            setattr(self, name, array(column.typecode, (column[image] for image in keep)))
        return dropped

    def _all_records(self) -> Iterator[PromptRecord]:
        return (self._record(image) for image in range(len(self.groups)))

    def _record(self, image: int) -> PromptRecord:
        row = self.source.read(self._offset[image])
        records = check_row(row, self._index[image], self._line[image], self.defaults)
        tokens = self._tokens[image]
        return replace(records[self._copy[image]], text_tokens=tokens, text_length=bucket(tokens, self.text_lengths))


def take_in(
    source: PromptFile,
    defaults: RowDefaults,
    text_lengths: tuple[int, ...],
    count_tokens: TokenCounter,
    status: Status = lambda record: None,
    limit: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Intake:
    """Reads `source` to its end, or its first `limit` rows.

    Args:
        count_tokens: T5 tokens of each prompt, end token included.
        status: "done" for an image that is committed already, None for one to make; raises RowError for one that may
            not be made.
        tick: called for every row.
    """
    intake = Intake(source, defaults, text_lengths)
    seen: set[str] = set()
    interned: dict[Group, Group] = {}
    first_with: dict[int, int] = {}  # by hash: should two prompts share one, they would only be neighbours
    chunk: list[tuple[int, int, list[tuple[int, PromptRecord]]]] = []

    def flush() -> None:
        counts = count_tokens([records[0][1].prompt for _, _, records in chunk])
        for (offset, index, records), tokens in zip(chunk, counts, strict=True):
            text_length = bucket(tokens, text_lengths)
            first = first_with.setdefault(hash(records[0][1].prompt), len(intake.groups))
            for copy, record in records:
                group = Group(record.height, record.width, text_length, record.num_inference_steps)
                intake.groups.append(interned.setdefault(group, group))
                intake.prompts.append(first)
                intake._offset.append(offset)
                intake._index.append(index)
                intake._line.append(record.line)
                intake._copy.append(copy)
                intake._tokens.append(tokens)
                intake.truncated += tokens > text_length
        chunk.clear()

    for raw in source.scan():
        if limit is not None and raw.number >= limit:
            break
        intake.rows += 1
        tick()
        try:
            if isinstance(raw.value, RowError):
                raise raw.value
            records = check_row(raw.value, raw.number, raw.line, defaults)
            ids = [record.id for record in records]
            if not seen.isdisjoint(ids):
                taken = next(id for id in ids if id in seen)
                raise RowError(f"id {taken} is already used by an earlier row", id=taken)
            seen.update(ids)
            wanted = [(copy, record) for copy, record in enumerate(records) if status(record) != "done"]
        except RowError as error:
            intake.failures.append(Failure(error.id, raw.line, error.kind, str(error)))
            continue
        intake.done += len(records) - len(wanted)
        if wanted:
            chunk.append((raw.offset, raw.number, wanted))
        if len(chunk) == _CHUNK:
            flush()
    flush()
    return intake
