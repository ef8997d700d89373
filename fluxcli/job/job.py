"""A job from its settings to its exit code: identity, intake, plan, run, and the row in runs.jsonl."""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from fluxcli import __version__
from fluxcli.core.config import EngineConfig, ImageFormat, RowDefaults
from fluxcli.core.errors import InputError, JobError
from fluxcli.core.files import folds_case
from fluxcli.core.records import ShapeKey
from fluxcli.core.terminal import printable_line
from fluxcli.job.fleet.fleet import Destination, Fleet
from fluxcli.job.fleet.process import Workers
from fluxcli.job.input.intake import Intake, Status, take_in
from fluxcli.job.input.keys import NO_COLUMNS, Columns
from fluxcli.job.input.read import Format, PromptFile
from fluxcli.job.output.committed import committed_status, read_committed, read_prompts
from fluxcli.job.output.failed import Failed, read_failed
from fluxcli.job.output.identity import Given, check_identity, read_identity
from fluxcli.job.output.sink import utc_now
from fluxcli.job.output.store import JobStore
from fluxcli.job.plan import BatchSize, Plan, padded_sizes, plan, size_of, work
from fluxcli.job.report import text as report
from fluxcli.job.run import signals
from fluxcli.job.run.lanes import ENCODERS, Engine, Lanes, LocalLane
from fluxcli.job.run.progress import Progress, Reading, told_if_slow
from fluxcli.job.run.runner import Runner
from fluxcli.job.run.saving import Saver
from fluxcli.job.run.signals import Stopped
from fluxcli.job.run.totals import Run, Totals
from fluxcli.job.run.writing import Writer
from fluxcli.models.checkpoints import Checkpoint
from fluxcli.models.scope import Scope
from fluxcli.models.tokenizers import Tokenizers


class AnotherInput(JobError):
    """The directory is another input's."""


@dataclass(frozen=True)
class Job:
    """The settings of one `fluxcli batch`. `input` is a path or "-", `format` None where its name says it."""

    input: str
    directory: Path
    checkpoint: Checkpoint
    engine: EngineConfig
    defaults: RowDefaults
    text_lengths: tuple[int, ...]
    image: ImageFormat
    batch_size: BatchSize
    limit: int | None = None
    strict: bool = False
    max_failures: int | None = None
    retry_failed: bool = True
    format: Format | None = None
    columns: Columns = NO_COLUMNS
    append: bool = False  # whether another input may go into the directory
    argv: tuple[str, ...] = ()  # as the command line had it, for runs.jsonl

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What job.json says: everything that changes pixels, row by row settings aside."""
        model = {
            "name": self.checkpoint.name,
            "revision": self.checkpoint.revision,
            "fingerprint": self.checkpoint.fingerprint(_known_fingerprint(self.directory)),
        }
        adapters = self.defaults.adapters
        options = {
            "dtype": self.engine.dtype,
            **({"quantization": self.engine.quantization} if self.engine.fp8 else {}),
            **({"step_cache": str(self.defaults.step_cache)} if self.defaults.step_cache.on else {}),
            **({"lora": [f"{each.sha256}={each.scale:g}" for each in adapters]} if adapters else {}),
            "text_lengths": list(self.text_lengths),
            "width": self.defaults.width,
            "height": self.defaults.height,
            "steps": self.defaults.num_inference_steps,
            "guidance": self.defaults.guidance_scale,
            **({"true_cfg_scale": self.defaults.true_cfg_scale} if self.defaults.true_cfg_scale > 1 else {}),
            **({"negative_prompt": negative} if (negative := self.defaults.negative_prompt) is not None else {}),
            **({"num_images": self.defaults.num_images} if self.defaults.num_images > 1 else {}),
            "seed": self.defaults.seed,
            "format": self.image.name,
            "quality": None if self.image.lossless else self.image.quality,
        }
        pixels = json.dumps([model["fingerprint"], options], sort_keys=True)
        return {
            "fluxcli": __version__,
            "created_at": utc_now(),
            "model": model,
            "options": options,
            "fingerprint": hashlib.sha256(pixels.encode()).hexdigest(),
        }

    def in_free_directory(self) -> "Job":
        """This job, moved to the first free name beside its directory if that holds another job."""
        job, number = self, 1
        while True:
            try:
                check_identity(job.directory, job.identity, job.input)
                return job
            except JobError:
                number += 1
                job = replace(self, directory=self.directory.with_name(f"{self.directory.name}-{number}"))

    def source(self, say: Callable[[str], None] = lambda text: None) -> PromptFile:
        """The input, opened, and unpacked where that is needed. To be closed."""
        with told_if_slow(say, f"{self.input}: opening"):
            return PromptFile(self.input, self.format, self.columns)

    def preview(self, source: PromptFile, say: Callable[[str], None] = lambda text: None) -> tuple[Intake, Plan]:
        """The plan as a look from outside: no lock taken, nothing mended, nothing written.

        Raises:
            InputError: a bad row, or one that asks for what is not done, where the job is strict.
        """
        check_identity(self.directory, self.identity, self.input)
        failed, committed = read_failed(self.directory), read_committed(self.directory)
        status = committed_status(committed)
        intake = self._accepted(source, status, lambda id, line: (id, line) in failed, say)
        self._check_input(source, intake, len(committed), failed)
        return intake, self.plan(intake)

    def whole_plan(self, source: PromptFile, say: Callable[[str], None] = lambda text: None) -> Plan:
        """The plan of the whole input, whatever is done already: what warming up has to cover."""
        return self.plan(self._take_in(source, lambda record: None, say))

    def plan(self, intake: Intake) -> Plan:
        sizes_of = {group: size_of(self.batch_size, group) for group in set(intake.groups)}
        sizes = padded_sizes(max(sizes_of.values(), default=1)) if self.engine.pads_batches else None
        return plan(intake.groups, sizes_of.__getitem__, sizes, intake.prompts)

    def run(
        self,
        engines: Callable[[list[ShapeKey]], Engine] | Workers,
        machine: dict[str, Any],
        say: Callable[[str], None],
        tell: Callable[[int, dict[str, Any]], None] = lambda status, totals: None,
        quiet: bool = False,
    ) -> tuple[int, dict[str, Any]]:
        """Does what is missing. Returns the exit code and the run's totals.

        Args:
            engines: what makes this process's, given every shape that it will have to run; or worker processes.
            machine: device, dtype and versions for runs.jsonl.
            tell: given what would be returned, where a signal ends the process before anything is in flight.
            quiet: show no progress.

        Raises:
            FluxcliError: nothing more can be done; what was committed stays.
        """
        with closing(self.source(say)) as source:
            intake = None
            if self.strict and not (self.directory / "job.json").exists():
                # Looked at before a directory is made for it.
                intake = self._accepted(source, lambda record: None, lambda id, line: False, say)
            with told_if_slow(say, f"{self.directory}: reading what is done"):
                store = JobStore(self.directory, self.identity, self.image.suffix, say, self.input)
            with closing(store):
                run, status = Run(store, machine, Totals(done_before=store.images), argv=self.argv), 1

                def stop(stopped: Stopped) -> None:
                    say(f"{stopped}; everything finished is committed. Run the same command again to go on.")
                    run.record(stopped.exit_code)

                def leave(stopped: Stopped) -> None:
                    stop(stopped)
                    store.close()
                    tell(stopped.exit_code, report.totals_data(run.totals))

                with signals.last_words(leave):
                    try:
                        if intake is None or store.images:
                            intake = self._accepted(source, store.status, store.failed_before, say)
                        run.input = self._check_input(source, intake, store.images, store.failed)
                        store.take_in(run.input)
                        totals = run.totals
                        totals.rows, totals.done_before, totals.skipped = intake.rows, intake.done, intake.skipped
                        for line in (*report.remarks(intake), *report.failure_lines(intake.failures)):
                            say(line)
                        self._make(run, intake, engines, quiet)
                        status = 3 if totals.failures or totals.skipped else 0
                    except Stopped as stopped:
                        status = stopped.exit_code
                        stop(stopped)
                    except AnotherInput:
                        run.recorded = True  # a start that was refused is none
                        raise
                    finally:
                        with signals.held():
                            run.record(status)
        return status, report.totals_data(run.totals)

    def _make(
        self, run: Run, intake: Intake, engines: Callable[[list[ShapeKey]], Engine] | Workers, quiet: bool
    ) -> None:
        todo = self.plan(intake)
        run.planned, run.shapes = len(intake.groups), todo.shapes()
        cost = cache(partial(work, step_cache=self.defaults.step_cache))
        with Progress(len(intake.groups), sum(map(cost, intake.groups)), quiet=quiet) as progress:
            saver = Saver(run, progress, self.max_failures, cost)
            with signals.held():
                saver.fail(intake.failures, attempted=False, whole=intake.with_row)
            if not len(todo):
                return
            runner = Runner(run, intake, todo, saver, progress)

            def lanes() -> Lanes:
                if isinstance(engines, Workers):
                    return self._fleet(engines, len(todo), run, saver, progress)
                return self._own_lane(engines, run, saver, progress)

            with runner.prepare(lanes) as ready, signals.held():
                try:
                    runner.run(ready)
                finally:
                    progress.end()

    def _own_lane(
        self, make_engine: Callable[[list[ShapeKey]], Engine], run: Run, saver: Saver, progress: Progress
    ) -> Lanes:
        engine = make_engine([*run.shapes])
        writer = Writer(self.image, self.checkpoint.label, run.store.write, ENCODERS)
        lane = LocalLane(engine, writer, saver.place, progress.say)
        lane.warm_up(run.shapes)
        return lane

    def _fleet(self, workers: Workers, batches: int, run: Run, saver: Saver, progress: Progress) -> Lanes:
        destination = Destination(run.store, self.image, self.checkpoint.label, saver.place)
        fleet = Fleet(workers.first(batches), run.shapes, destination, progress.say)
        run.workers, progress.pulse = fleet.describe, fleet.pulse
        return fleet

    def _accepted(
        self,
        source: PromptFile,
        status: Status,
        failed_before: Callable[[str | None, int], bool],
        say: Callable[[str], None],
    ) -> Intake:
        """The intake without rows that are not to be tried again.

        Raises:
            InputError: a bad row, or one that asks for what is not done, where the job is strict.
        """
        intake = self._take_in(source, status, say)
        if not self.retry_failed:
            intake.drop(failed_before)
        if self.strict:
            stop = "--strict stops before any work"
            if intake.failures:
                first, count = intake.failures[0], len(intake.failures)
                raise InputError(f"{source.name}, line {first.line}: {first.message} ({count} bad rows in all; {stop})")
            for line in report.remark_lines(intake.tally):
                raise InputError(f"{source.name}: {line}; {stop}")
        return intake

    def _check_input(self, source: PromptFile, intake: Intake, images: int, failed: Failed) -> Given:
        """The input, held against the one that the directory was last given.

        Raises:
            AnotherInput: it has another path, another text, and none of the images or failed rows that are there.
        """
        todo = len(intake.groups) + len(intake.failures) + intake.skipped
        given = Given(source.path, source.sha256, intake.rows, images + todo)
        known = read_identity(self.directory)
        last = known.input if known else None
        if self.append or last is None or not images or intake.done or not intake.rows:
            return given
        if last.sha256 == given.sha256 or (last.path is not None and last.path == given.path):
            return given
        if not source.has_id(failed.ids()):
            theirs = f"a job of {printable_line(last.path or 'a stream')}"
            raise AnotherInput(
                f"{self.directory}: holds {theirs}, and {source.name} has none of its rows; choose another -o, or "
                "--append adds them"
            )
        return given

    def _take_in(self, source: PromptFile, status: Status, say: Callable[[str], None]) -> Intake:
        scope = Scope(self.checkpoint)
        count = scope.watching(Tokenizers(self.checkpoint.tokenizers).count)
        settings = (source, self.defaults, self.text_lengths, count, status, self.limit)
        intake = take_in(*settings, partial(read_prompts, self.directory), folds_case(self.directory), Reading(say))
        intake.remarks += scope.lines(intake.groups)
        return intake


def _known_fingerprint(directory: Path) -> str | None:
    """The model's, as the job in `directory` has it; None where there is none that can be read: `check_identity` says
    what is wrong with it."""
    path = directory / "job.json"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return str(json.loads(file.read(2**20))["model"]["fingerprint"])
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        return None
