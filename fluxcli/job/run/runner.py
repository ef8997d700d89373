"""Drives a plan on lanes: keeps every device busy with one batch while the last one is encoded, written and
committed."""

import time
from collections.abc import Callable

from fluxcli.core.records import Batch, Failure
from fluxcli.job.input.intake import Intake
from fluxcli.job.plan import Plan, PlannedBatch
from fluxcli.job.run import signals
from fluxcli.job.run.lanes import Failed, Lane, Lanes, Made
from fluxcli.job.run.progress import Progress
from fluxcli.job.run.queue import Work
from fluxcli.job.run.saving import Saver
from fluxcli.job.run.totals import Run

_DEATHS = 2  # of workers that held a batch: then it is halved, or its one row has failed


class Runner:
    """Runs what an intake left to do."""

    def __init__(self, run: Run, intake: Intake, plan: Plan, saver: Saver, progress: Progress) -> None:
        self._run, self._intake, self._plan = run, intake, plan
        self._saver, self._progress = saver, progress
        self._index = 0
        self._submitted: dict[int, Work] = {}  # by batch index
        self._lanes: dict[int, Lane] = {}  # those that hold them
        self._since = 0.0  # when the last one began, or another's end let it begin

    def prepare(self, open_lanes: Callable[[], Lanes]) -> Lanes:
        """Lanes that are ready to begin."""
        start = time.perf_counter()
        lanes = open_lanes()
        self._run.totals.warm_up_s = time.perf_counter() - start
        return lanes

    def run(self, lanes: Lanes) -> None:
        """Makes every image of the plan.

        Raises:
            Stopped: after committing what was in flight, on SIGINT or SIGTERM.
            TooManyFailures: more rows failed than may.
        """
        start = time.perf_counter()
        self._progress.start()
        try:
            with self._saver, signals.in_flight(self._stopping):
                self._drive(lanes)
        finally:
            self._run.totals.seconds = time.perf_counter() - start
        signals.check()

    def _drive(self, lanes: Lanes) -> None:
        """Queues one batch behind the other. A batch that fails goes back in halves, so that what made it fail costs no
        other row its image."""
        self._queue = lanes.queue(self._plan)
        while not signals.noted() and (self._queue or lanes.busy):
            while not signals.noted() and any([self._submit(lane) for lane in lanes.free()]):
                pass
            self._settle(lanes)
        lanes.finish()
        while lanes.busy:
            self._settle(lanes)

    def _submit(self, lane: Lane) -> bool:
        """Whether there was a batch for it."""
        work = self._queue.take(lane)
        while work is not None and len(work.planned.rows) > lane.limit(work.planned.key):
            self._queue.give_back([Work(half) for half in self._split(work.planned)])
            work = self._queue.take(lane)
        if work is None:
            return False
        planned = work.planned
        steps = planned.num_inference_steps
        mask = self._intake.defaults.step_cache.mask(steps)
        records = self._intake.records(planned.rows)
        batch = Batch(self._index, planned.key, steps, records, mask, planned.adapters)
        if not self._submitted:
            self._since = time.perf_counter()
        self._submitted[self._index], self._lanes[self._index] = work, lane
        self._index += 1
        lane.submit(batch, alone=work.suspect)
        return True

    def _stopping(self) -> str:
        """Called by a signal, between any two instructions of `_drive`."""
        oldest = {id(lane): index for index, lane in reversed(self._lanes.items())}
        # One lane makes what is queued in it too; of several each leaves that.
        held = oldest.values() if len(oldest) > 1 else self._submitted
        rows = [row for index in held for row in self._submitted[index].planned.rows]
        cost = sum(self._saver.work(self._intake.groups[row]) for row in rows)
        return self._progress.stopping(len(held), cost, time.perf_counter() - self._since)

    def _settle(self, lanes: Lanes) -> None:
        for each in lanes.wait():
            self._since = time.perf_counter()
            work = self._submitted.pop(each.batch.index)
            del self._lanes[each.batch.index]
            if isinstance(each, Made):
                self._saver.add(each)
            elif each.kind == "worker_died":
                self._bury(work, each)
            elif len(work.planned.rows) > 1:
                self._queue.give_back([Work(half) for half in self._split(work.planned)])
            else:
                self._fail(each)

    def _bury(self, work: Work, failed: Failed) -> None:
        """A batch whose worker died is tried once more, then halved until the row that kills is alone. That row has two
        tries of its own."""
        deaths, planned = work.deaths + 1, work.planned
        if deaths < _DEATHS:
            self._queue.give_back([Work(planned, deaths, suspect=True)])
        elif len(planned.rows) > 1:
            self._queue.give_back(
                [Work(half, deaths=1 if len(half.rows) > 1 else 0, suspect=True) for half in self._split(planned)]
            )
        else:
            self._fail(failed)

    def _fail(self, failed: Failed) -> None:
        record = failed.batch.records[0]
        self._saver.fail([Failure.of(record, failed.kind, failed.message)])

    def _split(self, planned: PlannedBatch) -> list[PlannedBatch]:
        """Two halves, each at the smallest batch size that the plan's rules allow it."""
        middle = (len(planned.rows) + 1) // 2
        return [self._plan.at_own_size(planned, rows) for rows in (planned.rows[:middle], planned.rows[middle:])]
