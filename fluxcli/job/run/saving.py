"""Images from temporary files to committed rows, behind the lanes' back and in the order they were added. A disk that
cannot be written ends the run."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from fluxcli.core.errors import FluxcliError
from fluxcli.core.records import Batch, Failure, Group, PromptRecord, Timing
from fluxcli.core.terminal import counted
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.run.lanes import Made
from fluxcli.job.run.progress import Progress
from fluxcli.job.run.totals import Run
from fluxcli.job.run.writing import Saved

# Batches that may wait for the disk before the lanes wait for them: bounds the host's memory.
_COMMITS_AHEAD = 2


class TooManyFailures(FluxcliError):
    pass


class Saver:
    """Commits a run's images. As a context it ends with everything committed that was added.

    Args:
        max_failures: stop when more rows than this have failed; None for never.
        work: what an image of a group costs, as `progress` counts it.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        max_failures: int | None = None,
        work: Callable[[Group], float] = lambda group: 1.0,
    ) -> None:
        self._run, self._progress, self._max_failures, self.work = run, progress, max_failures, work
        self._placed = 0
        self._commits: deque[Future[None]] = deque()
        self._failing = threading.Lock()
        self._committer = ThreadPoolExecutor(1, "commit")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._committer:
            while self._commits:
                self._commits.popleft().result()

    def place(self, record: PromptRecord) -> str:
        """The file name of an image that is to be saved."""
        path = self._run.store.place(record.id, self._placed)
        self._placed += 1
        return path

    def add(self, made: Made) -> None:
        """Queues a batch. Waits where too many wait already.

        Raises:
            JobError, TooManyFailures: from this batch or one before it.
        """
        self._commits.append(self._committer.submit(self._commit, made))
        while len(self._commits) > _COMMITS_AHEAD:
            self._commits.popleft().result()

    def fail(
        self,
        failures: Sequence[Failure],
        *,
        attempted: bool = True,
        whole: Callable[[Failure], Failure] = lambda failure: failure,
    ) -> None:
        """Writes failed rows down, as `JobStore.fail`; those that were not `attempted`, and are bad just as before, no
        second time.

        Raises:
            TooManyFailures: more than `max_failures` by now.
        """
        if not failures:
            return
        totals, store = self._run.totals, self._run.store
        with self._failing:  # rows fail in the loop, in the plan and at the commit
            store.fail(failures, attempted=attempted, whole=whole)
            totals.failures += len(failures)
        self._progress.advance(0, failed=len(failures))
        if self._max_failures is not None and totals.failures > self._max_failures:
            first = failures[0]
            raise TooManyFailures(
                f"{counted(totals.failures, 'row')} failed, more than --max-failures {self._max_failures} "
                f"(line {first.line}: {first.message}); see failures.jsonl in {store.directory}"
            )

    def _commit(self, made: Made) -> None:
        written, rows, failures = [], [], []
        for slot, saved in enumerate(made.saved()):
            if isinstance(saved, Failure):
                failures.append(saved)
                continue
            own = Timing(made.timing.encode_s, made.timing.denoise_s, made.timing.decode_s, saved.seconds)
            written.append(saved.image)
            rows.append(self._row(made.batch, slot, saved, own, made.worker))
            self._run.totals.add(own)
            self._run.totals.truncated += made.batch.records[slot].truncated
        self._run.store.commit(written, rows)
        self._run.totals.images += len(rows)
        self._progress.advance(len(rows), work=len(rows) * self.work(made.batch.records[0].group))
        self.fail(failures)

    def _row(self, batch: Batch, slot: int, saved: Saved, timing: Timing, worker: int | None) -> ManifestRow:
        record = batch.records[slot]
        return ManifestRow(
            id=record.id,
            prompt=record.prompt,
            file_name=saved.image.file_name,
            sha256=saved.image.sha256,
            seed=record.seed,
            width=record.width,
            height=record.height,
            num_inference_steps=record.num_inference_steps,
            guidance_scale=record.guidance_scale,
            negative_prompt=record.negative_prompt,
            true_cfg_scale=None if record.negative_prompt is None else record.true_cfg_scale,
            lora=[each.as_row() for each in record.adapters] or None,
            quantization=self._run.machine.get("quantization"),
            step_cache=batch.mask or None,
            evaluated_steps=batch.mask.count("1") or None,
            text_tokens=record.text_tokens,
            text_length=record.text_length,
            truncated=record.truncated,
            batch={"index": batch.index, "size": len(batch.records), "slot": slot},
            worker=worker,
            timing=timing.as_row(),
            run=self._run.store.run,
            finished_at=saved.image.finished_at,
            meta=record.meta,
            extra={"comment_truncated": True} if saved.comment_truncated else {},
        )
