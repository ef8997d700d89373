"""Images from pixels to committed rows, behind the engine's back: encoded by several threads, committed in order by
one. An image that cannot be saved is a failed row; a disk that cannot be written ends the run."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from fluxcli.core.config import ImageFormat
from fluxcli.core.errors import FluxcliError, first_line
from fluxcli.core.records import Batch, Failure, Group, Images, PromptRecord, Timing
from fluxcli.job.output import images
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.output.sink import Written
from fluxcli.job.run.progress import Progress
from fluxcli.job.run.totals import Run

# Encoded batches that may wait for the disk before the device waits for them: bounds the host's memory.
_COMMITS_AHEAD = 2
_ENCODERS = min(8, os.cpu_count() or 1)


class TooManyFailures(FluxcliError):
    pass


class Saver:
    """Saves a run's images. As a context it ends with everything committed that was added.

    Args:
        model: its name in the images.
        max_failures: stop when more rows than this have failed; None for never.
        work: what an image of a group costs, as `progress` counts it.
    """

    def __init__(
        self,
        run: Run,
        format: ImageFormat,
        model: str,
        progress: Progress,
        max_failures: int | None = None,
        work: Callable[[Group], float] = lambda group: 1.0,
    ) -> None:
        self._run, self._progress, self._work = run, progress, work
        self._format, self._model, self._max_failures = format, model, max_failures
        self._placed = 0
        self._commits: deque[Future[None]] = deque()
        self._failing = threading.Lock()
        self._encoders = ThreadPoolExecutor(_ENCODERS, "encode")
        self._committer = ThreadPoolExecutor(1, "commit")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._encoders, self._committer:
            while self._commits:
                self._commits.popleft().result()

    def add(self, batch: Batch, result: Images) -> None:
        """Queues a batch. Waits where too many wait already.

        Raises:
            JobError, TooManyFailures: from this batch or one before it.
        """
        saving = [
            self._encoders.submit(self._save, record, result, slot, self._place(record))
            for slot, record in enumerate(batch.records)
        ]
        self._commits.append(self._committer.submit(self._commit, batch, saving, result.timing))
        while len(self._commits) > _COMMITS_AHEAD:
            self._commits.popleft().result()

    def fail(self, failures: Sequence[Failure], *, attempted: bool = True) -> None:
        """Writes failed rows down; those that were not `attempted`, and are bad just as before, no second time.

        Raises:
            TooManyFailures: more than `max_failures` by now.
        """
        if not failures:
            return
        totals, store = self._run.totals, self._run.store
        with self._failing:  # rows fail in the loop, in the plan and at the commit
            store.fail(failures, attempted=attempted)
            totals.failures += len(failures)
        self._progress.advance(0, failed=len(failures))
        if self._max_failures is not None and totals.failures > self._max_failures:
            first = failures[0]
            raise TooManyFailures(
                f"{totals.failures} rows failed, more than --max-failures {self._max_failures} "
                f"(line {first.line}: {first.message}); see failures.jsonl in {store.directory}"
            )

    def _place(self, record: PromptRecord) -> str:
        path = self._run.store.place(record.id, self._placed)
        self._placed += 1
        return path

    def _save(self, record: PromptRecord, result: Images, slot: int, place: str) -> "_Saved | Failure":
        if not result.finite[slot]:
            return Failure(record.id, record.line, "non_finite", "the model's output is not finite for this row")
        start = time.perf_counter()
        try:
            data = images.encode(result.pixels[slot], self._format, record, self._model)
            written = self._run.store.write(place, data)
        except FluxcliError:
            raise
        except Exception as error:
            return Failure(record.id, record.line, "encode_error", first_line(error))
        return written, time.perf_counter() - start

    def _commit(self, batch: Batch, saving: Sequence["Future[_Saved | Failure]"], timing: Timing) -> None:
        written, rows, failures = [], [], []
        for slot, (record, future) in enumerate(zip(batch.records, saving, strict=True)):
            saved = future.result()
            if isinstance(saved, Failure):
                failures.append(saved)
                continue
            image, save_s = saved
            own = Timing(timing.encode_s, timing.denoise_s, timing.decode_s, save_s)
            written.append(image)
            rows.append(self._row(record, image, batch, slot, own))
            self._run.totals.add(own)
            self._run.totals.truncated += record.truncated
        self._run.store.commit(written, rows)
        self._run.totals.images += len(rows)
        self._progress.advance(len(rows), work=len(rows) * self._work(batch.records[0].group))
        self.fail(failures)

    def _row(self, record: PromptRecord, saved: Written, batch: Batch, slot: int, timing: Timing) -> ManifestRow:
        cut = images.comment_truncated(self._format, record, self._model)
        return ManifestRow(
            id=record.id,
            prompt=record.prompt,
            file_name=saved.file_name,
            sha256=saved.sha256,
            seed=record.seed,
            width=record.width,
            height=record.height,
            num_inference_steps=record.num_inference_steps,
            guidance_scale=record.guidance_scale,
            quantization=self._run.machine.get("quantization"),
            step_cache=batch.mask or None,
            evaluated_steps=batch.mask.count("1") or None,
            text_tokens=record.text_tokens,
            text_length=record.text_length,
            truncated=record.truncated,
            batch={"index": batch.index, "size": len(batch.records), "slot": slot},
            timing=timing.as_row(),
            run=self._run.store.run,
            finished_at=saved.finished_at,
            meta=record.meta,
            extra={"comment_truncated": True} if cut else {},
        )


_Saved = tuple[Written, float]  # an image, and the seconds it took to save
