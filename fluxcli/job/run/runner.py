"""Drives a plan on a lane: keeps the device busy with one batch while the last one is encoded, written and
committed."""

import time
from collections import deque
from collections.abc import Callable

from fluxcli.core.errors import FluxcliError, OutOfMemory, first_line
from fluxcli.core.records import Batch, Failure
from fluxcli.job.input.intake import Intake
from fluxcli.job.plan import Plan, PlannedBatch
from fluxcli.job.run import signals
from fluxcli.job.run.lanes import Engine, Flight, LocalLane
from fluxcli.job.run.progress import Progress
from fluxcli.job.run.saving import Saver
from fluxcli.job.run.totals import Run


class Runner:
    """Runs what an intake left to do."""

    def __init__(self, run: Run, intake: Intake, plan: Plan, saver: Saver, progress: Progress) -> None:
        self._run, self._intake, self._plan = run, intake, plan
        self._saver, self._progress = saver, progress

    def prepare(self, make_engine: Callable[[], Engine]) -> LocalLane:
        """A lane with every shape of the plan ready."""
        start = time.perf_counter()
        lane = LocalLane(make_engine(), self._progress.say)
        lane.warm_up(self._plan.shapes())
        self._run.totals.warm_up_s = time.perf_counter() - start
        return lane

    def run(self, lane: LocalLane) -> None:
        """Makes every image of the plan.

        Raises:
            Stopped: after committing what was in flight, on SIGINT or SIGTERM.
            TooManyFailures: more rows failed than may.
        """
        start = time.perf_counter()
        self._progress.start()
        try:
            with self._saver:
                self._submit_all(lane)
        finally:
            self._run.totals.seconds = time.perf_counter() - start
        signals.check()

    def _submit_all(self, lane: LocalLane) -> None:
        """Queues one batch behind the other. A batch that fails goes back in halves, so that what made it fail costs no
        other row its image."""
        waiting = deque(self._plan)
        in_flight: tuple[Batch, Flight] | None = None
        index = 0
        while waiting and not signals.noted():
            if in_flight and in_flight[1].ready():
                self._finish(*in_flight)
                in_flight = None
            planned = waiting.popleft()
            if len(planned.rows) > lane.limit(planned.key):
                waiting.extendleft(reversed(self._split(planned)))
                continue
            steps = planned.num_inference_steps
            mask = self._intake.defaults.step_cache.mask(steps)
            batch = Batch(index, planned.key, steps, self._intake.records(planned.rows), mask)
            index += 1
            submitted = None
            try:
                submitted = lane.submit(batch)
            except OutOfMemory as error:
                self._retry(planned, batch, "out_of_memory", error, waiting)
            except FluxcliError:
                raise
            except Exception as error:
                self._retry(planned, batch, "engine_error", error, waiting)
            if in_flight:
                self._finish(*in_flight)
            in_flight = (batch, submitted) if submitted else None
        if in_flight:
            self._finish(*in_flight)

    def _finish(self, batch: Batch, flight: Flight) -> None:
        self._saver.add(batch, flight.result())

    def _retry(
        self, planned: PlannedBatch, batch: Batch, kind: str, error: Exception, waiting: "deque[PlannedBatch]"
    ) -> None:
        if len(planned.rows) > 1:
            waiting.extendleft(reversed(self._split(planned)))
            return
        record = batch.records[0]
        self._saver.fail([Failure(record.id, record.line, kind, first_line(error))])

    def _split(self, planned: PlannedBatch) -> list[PlannedBatch]:
        """Two halves, each at the smallest batch size that the plan's rules allow it."""
        middle = (len(planned.rows) + 1) // 2
        return [self._plan.at_own_size(planned, rows) for rows in (planned.rows[:middle], planned.rows[middle:])]
