"""Drives a plan on an engine: keeps the device busy with one batch while the last one is encoded, written and
committed."""

import os
import platform
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from fluxcli import __version__
from fluxcli.core.config import ImageFormat
from fluxcli.core.errors import FluxcliError, OutOfMemory, first_line
from fluxcli.core.records import Batch, Failure, Pictures, PromptRecord, ShapeKey, Timing, WarmUp
from fluxcli.job.input.intake import Intake
from fluxcli.job.output import images
from fluxcli.job.output.rows import ManifestRow
from fluxcli.job.output.sink import Written, utc_now
from fluxcli.job.output.store import JobStore
from fluxcli.job.plan import Plan, PlannedBatch
from fluxcli.job.run.progress import Progress

# Encoded batches that may wait for the disk before the device waits for them: bounds the host's memory.
_COMMITS_AHEAD = 2
_ENCODERS = min(8, os.cpu_count() or 1)


class Flight(Protocol):
    def ready(self) -> bool: ...
    def result(self) -> Pictures: ...


class Engine(Protocol):
    """What the runner needs of `fluxcli.engine.engine.Engine`."""

    def warm_up(self, keys: Iterable[ShapeKey], report: Callable[[WarmUp], None] = ...) -> list[WarmUp]: ...
    def submit(self, batch: Batch) -> Flight: ...


@dataclass
class Totals:
    """What a run did."""

    images: int = 0
    failures: int = 0
    seconds: float = 0.0
    warm_up_s: float = 0.0
    stages: dict[str, float] = field(
        default_factory=lambda: {"encode": 0.0, "denoise": 0.0, "decode": 0.0, "save": 0.0}
    )

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def add(self, timing: Timing) -> None:
        parts = (timing.encode_s, timing.denoise_s, timing.decode_s, timing.save_s)
        for stage, seconds in zip(self.stages, parts, strict=True):
            self.stages[stage] += seconds


class TooManyFailures(FluxcliError):
    pass


class Stopped(Exception):
    """SIGINT or SIGTERM came; what was in flight is committed."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class Runner:
    """Runs what an intake left to do.

    Args:
        max_failures: stop when more rows than this have failed; None for never.
    """

    def __init__(
        self,
        store: JobStore,
        intake: Intake,
        plan: Plan,
        format: ImageFormat,
        model: str,
        max_failures: int | None = None,
    ) -> None:
        self._store, self._intake, self._plan = store, intake, plan
        self._format, self._model, self._max_failures = format, model, max_failures
        self.totals = Totals()
        self._placed = 0
        self._limits: dict[ShapeKey, int] = {}  # shape, its batch size zeroed -> largest batch known to fit
        self._failing = threading.Lock()
        self._started_at = utc_now()

    def run(self, make_engine: Callable[[], Engine], progress: Progress) -> Totals:
        """Makes every image of the plan.

        Raises:
            Stopped: after committing what was in flight, on SIGINT or SIGTERM.
            TooManyFailures: more than `max_failures` rows failed.
        """
        self._fail(self._intake.failures, progress, attempted=False)
        with _stop_on_signals() as stopping:
            if len(self._plan):
                start = time.perf_counter()
                engine = make_engine()
                self._warm_up(engine, progress)
                self.totals.warm_up_s = time.perf_counter() - start
                stopping.idle = False
                self._run_batches(engine, progress, stopping)
            if stopping.signal is not None:
                raise Stopped(stopping.signal)
        return self.totals

    def record(self, exit_status: int, machine: dict[str, Any]) -> None:
        """This start's row in runs.jsonl. `machine` is its device, dtype and versions."""
        totals = self.totals
        self._store.record_run(
            {
                "host": socket.gethostname(),
                **machine,
                "versions": {"fluxcli": __version__, "python": platform.python_version(), **machine["versions"]},
                "started_at": self._started_at,
                "finished_at": utc_now(),
                "planned": len(self._intake.groups),
                "shapes": [str(key) for key in self._plan.shapes()],
                "images": totals.images,
                "failures": totals.failures,
                "seconds": round(totals.seconds, 3),
                "warm_up_s": round(totals.warm_up_s, 3),
                "stages_s": {name: round(seconds, 3) for name, seconds in totals.stages.items()},
                "images_per_s": round(totals.images_per_s, 4),
                "exit_status": exit_status,
            }
        )

    def _warm_up(self, engine: Engine, progress: Progress) -> None:
        for key in self._plan.shapes():
            try:
                engine.warm_up([key], lambda one: _tell(one, progress))
            except OutOfMemory as error:
                self._halve(key, progress, error)

    def _run_batches(self, engine: Engine, progress: Progress, stopping: "_Stopping") -> None:
        start = time.perf_counter()
        progress.start()
        commits: deque[Future[None]] = deque()
        with (
            ThreadPoolExecutor(_ENCODERS, "encode") as encoders,
            ThreadPoolExecutor(1, "commit") as committer,
        ):

            def finish(batch: Batch, flight: Flight) -> None:
                pictures = flight.result()
                saving = [
                    encoders.submit(self._save, record, pictures, slot, self._place(record))
                    if pictures.finite[slot]
                    else None
                    for slot, record in enumerate(batch.records)
                ]
                commits.append(committer.submit(self._commit, batch, saving, pictures.timing, progress))
                while len(commits) > _COMMITS_AHEAD:
                    commits.popleft().result()

            try:
                self._submit_all(engine, progress, stopping, finish)
            finally:
                while commits:
                    commits.popleft().result()
                self.totals.seconds = time.perf_counter() - start

    def _submit_all(
        self, engine: Engine, progress: Progress, stopping: "_Stopping", finish: Callable[[Batch, Flight], None]
    ) -> None:
        """Queues one batch behind the other. A batch that fails goes back in halves, so that what made it fail costs no
        other row its image."""
        waiting = deque(self._plan)
        in_flight: tuple[Batch, Flight] | None = None
        index = 0
        while waiting and stopping.signal is None:
            if in_flight and in_flight[1].ready():
                finish(*in_flight)
                in_flight = None
            planned = waiting.popleft()
            if len(planned.rows) > self._limit(planned.key):
                waiting.extendleft(reversed(self._split(planned)))
                continue
            batch = Batch(index, planned.key, planned.num_inference_steps, self._intake.records(planned.rows))
            index += 1
            submitted = None
            try:
                submitted = engine.submit(batch)
            except OutOfMemory as error:
                self._halve(batch.key, progress, error)
                self._retry(planned, batch, "out_of_memory", error, waiting, progress)
            except FluxcliError:
                raise
            except Exception as error:
                self._retry(planned, batch, "engine_error", error, waiting, progress)
            if in_flight:
                finish(*in_flight)
            in_flight = (batch, submitted) if submitted else None
        if in_flight:
            finish(*in_flight)

    def _retry(
        self,
        planned: PlannedBatch,
        batch: Batch,
        kind: str,
        error: Exception,
        waiting: "deque[PlannedBatch]",
        progress: Progress,
    ) -> None:
        if len(planned.rows) > 1:
            waiting.extendleft(reversed(self._split(planned)))
            return
        reason = first_line(error)
        record = batch.records[0]
        self._fail([Failure(record.id, record.line, kind, reason)], progress)

    def _split(self, planned: PlannedBatch) -> list[PlannedBatch]:
        """Two halves, each at the smallest batch size that the plan's rules allow it."""
        middle = (len(planned.rows) + 1) // 2
        return [self._plan.at_own_size(planned, rows) for rows in (planned.rows[:middle], planned.rows[middle:])]

    def _limit(self, key: ShapeKey) -> int:
        return self._limits.get(key._replace(batch_size=0), key.batch_size)

    def _halve(self, key: ShapeKey, progress: Progress, error: OutOfMemory) -> None:
        """Remembers, for this shape, that batches of this size do not fit."""
        limit = max(1, key.batch_size // 2)
        self._limits[key._replace(batch_size=0)] = limit
        if key.batch_size > 1:
            progress.say(f"{error}: going on with batches of at most {limit}")

    def _place(self, record: PromptRecord) -> Any:
        path = self._store.place(record.id, self._placed)
        self._placed += 1
        return path

    def _save(self, record: PromptRecord, pictures: Pictures, slot: int, place: Any) -> tuple[Written, float]:
        start = time.perf_counter()
        written = self._store.write(place, images.encode(pictures.pixels[slot], self._format, record, self._model))
        return written, time.perf_counter() - start

    def _commit(
        self,
        batch: Batch,
        saving: Sequence["Future[tuple[Written, float]] | None"],
        timing: Timing,
        progress: Progress,
    ) -> None:
        written, rows, failures = [], [], []
        for slot, (record, future) in enumerate(zip(batch.records, saving, strict=True)):
            if future is None:
                failures.append(
                    Failure(record.id, record.line, "non_finite", "the model's output is not finite for this row")
                )
                continue
            saved, save_s = future.result()
            own = Timing(timing.encode_s, timing.denoise_s, timing.decode_s, save_s)
            written.append(saved)
            rows.append(self._row(record, saved, batch, slot, own))
            self.totals.add(own)
        self._store.commit(written, rows)
        self.totals.images += len(rows)
        progress.advance(len(rows))
        self._fail(failures, progress)

    def _row(self, record: PromptRecord, saved: Written, batch: Batch, slot: int, timing: Timing) -> ManifestRow:
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
            text_tokens=record.text_tokens,
            text_length=record.text_length,
            truncated=record.truncated,
            batch={"index": batch.index, "size": len(batch.records), "slot": slot},
            timing=timing.as_row(),
            run=self._store.run,
            finished_at=saved.finished_at,
            meta=record.meta,
        )

    def _fail(self, failures: Sequence[Failure], progress: Progress, *, attempted: bool = True) -> None:
        if not failures:
            return
        with self._failing:  # rows fail in the loop, in the plan and at the commit
            self._store.fail(failures, attempted=attempted)
            self.totals.failures += len(failures)
        progress.advance(0, failed=len(failures))
        if self._max_failures is not None and self.totals.failures > self._max_failures:
            first = failures[0]
            raise TooManyFailures(
                f"{self.totals.failures} rows failed, more than --max-failures {self._max_failures} "
                f"(line {first.line}: {first.message}); see failures.jsonl in {self._store.directory}"
            )


def _tell(one: WarmUp, progress: Progress) -> None:
    if one.graphs:
        progress.say(f"ready for {one.key}: {one.seconds:.1f} s, {one.state}, {one.attention} attention")


@dataclass
class _Stopping:
    """What a signal asked for. While `idle`, with no batch in flight, there is nothing to wait for."""

    signal: int | None = None
    idle: bool = True


@contextmanager
def _stop_on_signals() -> Iterator[_Stopping]:
    """The first SIGINT or SIGTERM asks the loop to stop after the batch in flight; a second one leaves at once, which
    the commit protocol allows at any moment."""
    stopping = _Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopping.signal is not None:
            os._exit(128 + number)
        stopping.signal = number
        if stopping.idle:
            raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    except Exception as error:
        # Raised amid an import, `Stopped` may have been caught there and become another error.
        if stopping.signal is not None and stopping.idle and not isinstance(error, Stopped):
            raise Stopped(stopping.signal) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
