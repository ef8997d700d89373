"""One pass over the input: check every row, count its tokens, leave out what is done. What remains is a compact table
of numbers, so that a million rows need megabytes, and prompts are read again when their batch comes up."""

import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from fluxcli.core.config import RowDefaults
from fluxcli.core.errors import RowError
from fluxcli.core.records import Failure, Group, PromptRecord
from fluxcli.job.input.check import Checked, check_row, derived_seed, images_of
from fluxcli.job.input.ids import Ids, TakenId
from fluxcli.job.input.keys import NO_COLUMNS, Columns, Tally, schema_of
from fluxcli.job.input.moved import Moved
from fluxcli.job.input.read import RawRow, finite
from fluxcli.job.plan import bucket

TokenCounter = Callable[[list[str]], list[int]]
Status = Callable[[PromptRecord], str | None]
_CHUNK = 1024  # prompts tokenized at once
_MANY_CHANGED = 1000
_OPTIONS_IN_TEXT = re.compile(
    r"(?:^|\s)--(?:prompt|negative_prompt|seed|steps|width|height|cfg_scale|sampler_name|batch_size|n_iter)\s"
)


class Source(Protocol):
    """Rows that can be scanned once and read again, as `fluxcli.job.input.read.PromptFile`."""

    name: str
    format: Any
    columns: Columns

    def scan(self) -> Iterator[RawRow]: ...
    def read(self, offset: int, digest: int) -> dict[str, Any]: ...


class OneRow:
    """A source of one row that is no file's."""

    name, format, columns = "the row", "jsonl", NO_COLUMNS

    def __init__(self, row: dict[str, Any]) -> None:
        self._row = row

    def scan(self) -> Iterator[RawRow]:
        yield RawRow(0, 1, 0, self._row, 0)

    def read(self, offset: int, digest: int) -> dict[str, Any]:
        return self._row


@dataclass
class Intake:
    """The images still to make, as parallel arrays over image numbers, and what the pass found besides."""

    source: Source
    defaults: RowDefaults
    text_lengths: tuple[int, ...]
    groups: list[Group] = field(default_factory=list)
    rows: int = 0
    done: int = 0
    skipped: int = 0  # left out by `drop`
    prompts: "array[int]" = field(default_factory=lambda: array("q"))  # of each image: the first with its prompt
    failures: list[Failure] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what its user should know of the model
    tally: Tally = field(init=False)
    _offset: "array[int]" = field(default_factory=lambda: array("q"))
    _digest: "array[int]" = field(default_factory=lambda: array("q"))
    _index: "array[int]" = field(default_factory=lambda: array("q"))
    _line: "array[int]" = field(default_factory=lambda: array("q"))
    _copy: "array[int]" = field(default_factory=lambda: array("i"))
    _tokens: "array[int]" = field(default_factory=lambda: array("i"))

    def __post_init__(self) -> None:
        self.tally = Tally(takes_guidance=self.defaults.guidance_scale is not None)

    @property
    def truncated(self) -> int:
        """Images whose prompt is cut."""
        return sum(tokens > group.text_length for tokens, group in zip(self._tokens, self.groups, strict=True))

    def records(self, images: Sequence[int]) -> list[PromptRecord]:
        """The records of these images, read from the input again.

        Raises:
            InputError: a row is another than the pass found.
        """
        return [self._record(image) for image in images]

    def with_row(self, failure: Failure) -> Failure:
        """A failure with its row, read from the input again: a million bad ones are not held.

        Raises:
            InputError: the row is another than the pass found.
        """
        if failure.at is None:
            return failure
        row = {key: _jsonable(value) for key, value in self.source.read(*failure.at).items()}
        known = schema_of(row, self.source.columns).known
        if failure.id is not None and all(row[key] is None for key, name in known if name == "id"):
            row = {self.source.columns.id or "id": failure.id, **row}
        return replace(failure, row=row)

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
        for name in ("prompts", "_offset", "_digest", "_index", "_line", "_copy", "_tokens"):
            column = getattr(self, name)
            setattr(self, name, array(column.typecode, (column[image] for image in keep)))
        self.skipped += dropped
        return dropped

    def _all_records(self) -> Iterator[PromptRecord]:
        return (self._record(image) for image in range(len(self.groups)))

    def _record(self, image: int) -> PromptRecord:
        row = self.source.read(self._offset[image], self._digest[image])
        records = check_row(row, self._index[image], self._line[image], self.defaults, self.source.columns)
        tokens = self._tokens[image]
        return replace(records[self._copy[image]], text_tokens=tokens, text_length=bucket(tokens, self.text_lengths))

    def _add(self, raw: RawRow, wanted: list[tuple[int, Checked]], tokens: int, first: int) -> None:
        """Images of one row: (copy, record) each. `first` is the first image with this prompt."""
        text_length = bucket(tokens, self.text_lengths)
        for copy, record in wanted:
            steps, branches = record.num_inference_steps, 1 if record.negative_prompt is None else 2
            self.groups.append(Group(record.height, record.width, text_length, steps, branches, record.adapters))
            self.prompts.append(first)
            self._offset.append(raw.offset)
            self._digest.append(raw.digest)
            self._index.append(raw.number)
            self._line.append(raw.line)
            self._copy.append(copy)
            self._tokens.append(tokens)


def take_in(
    source: Source,
    defaults: RowDefaults,
    text_lengths: tuple[int, ...],
    count_tokens: TokenCounter,
    status: Status = lambda record: None,
    limit: int | None = None,
    committed: Callable[[], Iterable[tuple[str, str]]] = lambda: (),
    folds_case: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Intake:
    """Reads `source` to its end, or its first `limit` rows.

    Args:
        count_tokens: T5 tokens of each prompt, end token included.
        status: "done" for an image that is committed already, None for one to make; raises RowError for one that may
            not be made.
        committed: (id, prompt) of every image that is committed; asked only where rows seem to have moved.
        folds_case: whether `A` and `a` would be one file.
        tick: called now and then.

    Raises:
        InputError: the source breaks off, or rows without ids have moved.
    """
    ask = cast(Callable[[Checked], str | None], status)  # which looks at settings alone: both have them
    intake = Intake(source, defaults, text_lengths)
    ids = Ids(folds_case)
    moved = Moved()
    first_with: dict[int, int] = {}  # by hash: should two prompts share one, they would only be neighbours
    chunk: list[tuple[RawRow, list[tuple[int, Checked]]]] = []

    def flush() -> None:
        counts = count_tokens([wanted[0][1].prompt for _, wanted in chunk])
        given = dict.fromkeys(wanted[0][1].negative_prompt for _, wanted in chunk)
        negatives = [prompt for prompt in given if prompt is not None]
        negative = dict(zip(negatives, count_tokens(negatives), strict=True))
        for (raw, wanted), tokens in zip(chunk, counts, strict=True):
            if (other := wanted[0][1].negative_prompt) is not None:
                tokens = max(tokens, negative[other])
            intake._add(raw, wanted, tokens, first_with.setdefault(hash(wanted[0][1].prompt), len(intake.groups)))
        chunk.clear()

    columns, tally = source.columns, intake.tally
    rows = done = 0
    look_for_options = source.format == "txt"
    for raw in source.scan():
        if limit is not None and raw.number >= limit:
            break
        rows += 1
        if not rows % 64:  # a look at the clock costs a share of a row
            tick()
        row = raw.value
        try:
            if isinstance(row, RowError):
                raise row
            schema = schema_of(row, columns)
            tally.add(schema, row)
            records = images_of(row, schema, raw.number, raw.line, defaults)
            ids.add(records, raw.number, schema.has_id)
        except RowError as error:
            if isinstance(error, TakenId) and raw.again:
                rows -= 1
                continue
            intake.failures.append(_failure(error, raw))
            continue
        prompt = records[0].prompt
        if schema.true_cfg:
            tally.look_at(schema, row, records[0].negative_prompt is not None)
        if "<lora:" in prompt:
            tally.ask("<lora:...> in the prompt")
        if look_for_options and "--" in prompt and _OPTIONS_IN_TEXT.search(prompt):
            tally.ask("options like --seed in the text")
        try:
            if len(records) == 1:
                wanted = [] if ask(records[0]) == "done" else [(0, records[0])]
            else:
                wanted = [(copy, record) for copy, record in enumerate(records) if ask(record) != "done"]
        except RowError as error:
            try:
                wanted = [each for each in enumerate(records) if not _was_done(each[1], ask, defaults)]
            except RowError:
                intake.failures.append(_failure(error, raw))
                moved.look_at(records[0], raw.number, changed=True)
                if moved.changed == _MANY_CHANGED:  # a million failures need not be gathered to tell this
                    moved.check(source.name, committed(), None)
                continue
        done += len(records) - len(wanted)
        if wanted:
            moved.look_at(records[0], raw.number, changed=False)
            chunk.append((raw, wanted))
            if len(chunk) == _CHUNK:
                flush()
    moved.check(source.name, committed(), rows if limit is None else None)
    flush()
    intake.rows, intake.done = rows, done
    return intake


def _jsonable(value: Any) -> Any:
    """A value without numbers that JSON has not: NaN stays what it is, a value that no setting may have."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else finite(value)


def _failure(error: RowError, raw: RawRow) -> Failure:
    at = None if isinstance(raw.value, RowError) else (raw.offset, raw.digest)
    return Failure(error.id, raw.line, error.kind, str(error), at=at)


def _was_done(record: Checked, status: Callable[[Checked], str | None], defaults: RowDefaults) -> bool:
    """Whether an image is done, with its derived seed or with one of 63 bits, as they were before they had 53."""
    try:
        return status(record) == "done"
    except RowError:
        if record.seed != derived_seed(defaults.seed, record.id):
            raise
        return status(record._replace(seed=derived_seed(defaults.seed, record.id, bits=63))) == "done"
