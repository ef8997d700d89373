"""A worker as the job sees it: a lane whose engine is another process, what it holds, and what it did."""

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fluxcli import __version__
from fluxcli.core.errors import FluxcliError
from fluxcli.core.files import temporary_name
from fluxcli.core.records import Adapter, Adapters, Batch, Failure, PromptRecord, ShapeKey, Timing, WarmUp
from fluxcli.core.terminal import printable_line
from fluxcli.job.fleet import wire
from fluxcli.job.fleet.deadlines import Deadlines
from fluxcli.job.fleet.process import Spawned
from fluxcli.job.fleet.wire import Garbage, Message
from fluxcli.job.output.sink import FileSink, Written
from fluxcli.job.run.lanes import Failed, Made
from fluxcli.job.run.writing import Saved

_AHEAD = 2  # batches that it has not made yet: one on the device, one behind it
_SHA256 = re.compile(r"[0-9a-f]{64}").fullmatch
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z").fullmatch


@dataclass
class Lease:
    """A batch that is a worker's to make, and where its images go: file name and temporary of each."""

    batch: Batch
    places: list[tuple[str, str]]
    alone: bool
    made: bool = False


@dataclass
class Facts:
    """What one worker did in a run, over all its processes."""

    host: str | None = None
    device: str | None = None
    batches: int = 0
    images: int = 0
    device_s: float = 0.0
    warm_up_s: float = 0.0
    starts: int = 0
    deaths: int = 0
    fruitless: int = 0  # starts in a row that finished no batch, but for those that died of a suspect


class LastWords(Exception):
    """A worker says why it ends. `fault` is "disk", with the error's (errno, text, file name) in `disk`; "user", for
    what no other start would cure; or "device"."""

    def __init__(self, message: str, fault: str, disk: tuple[int, str, str] | None) -> None:
        super().__init__(message)
        self.fault, self.disk = fault, disk


class Worker:
    """A lane in another process.

    Args:
        spawn: starts a process; told how many were before.
        start: what a process is told first.
        place: where an image is to go, asked when its batch is handed out; None, as `sink`, where none is made.
    """

    def __init__(
        self,
        number: int,
        name: str,
        spawn: Callable[[int], Spawned],
        start: Message,
        place: Callable[[PromptRecord], str] | None,
        sink: FileSink | None,
        deadlines: Deadlines,
        say: Callable[[str], None],
        report: Callable[[WarmUp], None],
    ) -> None:
        self.number, self.name, self.facts = number, name, Facts()
        self._spawn, self._start, self._place, self._sink = spawn, start, place, sink
        self._deadlines, self._say, self._report = deadlines, say, report
        self.process: Spawned | None = None
        self.leases: dict[int, Lease] = {}
        self.begun = self.first_begun = 0.0  # when it was ready: this process, and the first
        self._limits: dict[ShapeKey, int] = {}
        self._shapes: set[ShapeKey] = set()  # handed out to this process
        self.adapters: Adapters = ()  # of the latest batch handed out to it
        self._warm: set[ShapeKey] = set()
        self._stopping = False
        self._heard = 0.0

    def start(self) -> Spawned:
        """Starts a process. It is given nothing that did not fit the last one's memory."""
        process = self.process = self._spawn(self.facts.starts)
        self.facts.starts += 1
        self.begun = 0.0
        self._shapes.clear()
        self.adapters = ()
        self._warm.clear()
        self._heard = self._started = time.monotonic()
        process.wire.send(self._start)
        return process

    def stop(self) -> None:
        """Has it end after what it has begun."""
        self._stopping = True
        if self.process is not None:
            self.process.wire.send({"kind": "stop"})

    @property
    def room(self) -> bool:
        """Whether it can be given a batch now."""
        if not self.begun or self._stopping or self.process is None:
            return False
        waiting = [lease for lease in self.leases.values() if not lease.made]
        return len(waiting) < _AHEAD and not any(lease.alone for lease in self.leases.values())

    @property
    def idle(self) -> bool:
        return not self.leases

    @property
    def host(self) -> str | None:
        """Where it is; None while that is not known."""
        return self.facts.host if self.begun else None

    def ready(self, key: ShapeKey) -> bool:
        return key in self._shapes

    def limit(self, key: ShapeKey) -> int:
        return self._limits.get(key._replace(batch_size=0), key.batch_size)

    def submit(self, batch: Batch, *, alone: bool = False) -> None:
        assert self.process is not None
        places = []
        for record in batch.records:
            assert self._place is not None
            folder, _, name = (file_name := self._place(record)).rpartition("/")
            places.append((file_name, f"{folder}/{temporary_name(name)}"))
        if all(lease.made for lease in self.leases.values()):
            self._heard = time.monotonic()
        self.leases[batch.index] = Lease(batch, places, alone)
        self._shapes.add(batch.key)
        self.adapters = batch.adapters
        self.process.wire.send(
            {
                "kind": "lease",
                "index": batch.index,
                "key": batch.key,
                "steps": batch.num_inference_steps,
                "mask": batch.mask,
                "adapters": [_plain_adapter(each) for each in batch.adapters],
                "records": [_plain(record) for record in batch.records],
                "places": places,
            }
        )

    def seconds(self, now: float) -> float:
        """Since it was first ready; not quite none before that."""
        return max(now - self.first_begun, 1e-9) if self.first_begun else math.inf

    def silence(self, now: float) -> float:
        """Seconds since it was last heard, or had something to say."""
        return now - self._heard

    @property
    def patience(self) -> float:
        """Seconds that it may be silent."""
        if not self.begun:
            return self._deadlines.start()
        if not self.leases:
            return math.inf
        lease = next((lease for lease in self.leases.values() if not lease.made), next(iter(self.leases.values())))
        key, steps = lease.batch.key, lease.batch.num_inference_steps
        return self._deadlines.batch(key, steps) if key in self._warm else self._deadlines.warm_up(key)

    def hear(self, message: Message) -> Made | Failed | None:
        """Takes in what it says.

        Raises:
            Garbage: it cannot be meant.
            LastWords: it ends.
            FluxcliError: it is of another version.
        """
        try:
            told = self._hear(message)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise Garbage(f"a message that cannot be meant: {printable_line(str(error))[:100]}") from error
        self._heard = time.monotonic()
        return told

    def _hear(self, message: Message) -> Made | Failed | None:
        kind = message["kind"]
        if kind == "ready":
            self._ready(message)
        elif kind == "said":
            self._say(f"{self.name}: {wire.text(message['text'])}")
        elif kind == "warmed":
            key = ShapeKey(*map(wire.whole, message["key"]))
            seconds, attention = wire.seconds(message["seconds"]), wire.text(message["attention"])
            one = WarmUp(key, seconds, wire.whole(message["graphs"]), wire.whole(message["misses"]), attention)
            self._warm.add(one.key)
            self._deadlines.warmed(one.key, one.seconds)
            self.facts.warm_up_s += one.seconds
            self._report(one)
        elif kind == "made":
            self.leases[message["lease"]].made = True
        elif kind == "done":
            return self._done(message)
        elif kind == "failed":
            lease = self.leases[message["lease"]]
            failed = Failed(lease.batch, wire.one_of(message["error"], _ERRORS), wire.text(message["message"]))
            if message["error"] == "out_of_memory":
                self._limits[lease.batch.key._replace(batch_size=0)] = max(1, wire.whole(message["limit"]))
            del self.leases[message["lease"]]
            return failed
        elif kind == "ending":
            disk = message["disk"]
            about = None if disk is None else (wire.whole(disk[0]), wire.text(disk[1]), wire.text(disk[2]))
            raise LastWords(wire.text(message["message"]), wire.one_of(message["fault"], _FAULTS), about)
        else:
            raise Garbage(f"a message of kind {printable_line(kind)[:50]}")
        return None

    def _ready(self, message: Message) -> None:
        version = wire.text(message["version"])
        if version != __version__:
            raise FluxcliError(
                f"{self.name} runs fluxcli {version}, this job {__version__}: it was installed anew meanwhile. "
                "Nothing committed is lost; run again to go on"
            )
        self.facts.host, self.facts.device = wire.text(message["host"]), wire.text(message["device"])
        self.begun = time.monotonic()
        self.first_begun = self.first_begun or self.begun
        self._deadlines.started(self.begun - self._started)
        self.facts.warm_up_s += self.begun - self._started

    def _done(self, message: Message) -> Made:
        lease = self.leases[message["lease"]]
        batch = lease.batch
        timing = Timing(*(wire.seconds(value) for value in message["timing"]))
        if len(message["saved"]) != len(batch.records):
            raise ValueError("not as many images as were asked for")
        saved = [self._saved(batch, lease, slot, each) for slot, each in enumerate(message["saved"])]
        seconds = len(batch.records) * (timing.encode_s + timing.denoise_s + timing.decode_s)
        self._deadlines.made(batch.key, batch.num_inference_steps, seconds)
        self.facts.batches += 1
        self.facts.images += sum(isinstance(each, Saved) for each in saved)
        self.facts.device_s += seconds
        self.facts.fruitless = 0
        del self.leases[message["lease"]]
        return Made(batch, timing, lambda: saved, self.number)

    def _saved(self, batch: Batch, lease: Lease, slot: int, told: Mapping[str, Any]) -> Saved | Failure:
        """An image that is where it was to go, as large as the worker says."""
        record = batch.records[slot]
        if "error" in told:
            return Failure.of(record, wire.one_of(told["error"], _ERRORS), wire.text(told["message"]))
        assert self._sink is not None
        file_name, temporary = lease.places[slot]
        if not _SHA256(told["sha256"]) or not _MOMENT(told["finished_at"]):
            raise ValueError("no image's hash and time")
        try:
            size = self._sink.stat(temporary).st_size
        except FileNotFoundError as error:
            raise ValueError("an image that is not there") from error
        if size != told["size"]:
            raise ValueError("an image of another size")
        image = Written(temporary, file_name, told["sha256"], told["finished_at"])
        return Saved(image, wire.seconds(told["seconds"]), bool(told["comment_truncated"]))


_ERRORS = ("out_of_memory", "engine_error", "non_finite", "encode_error")
_FAULTS = ("disk", "user", "device")


def _plain_adapter(adapter: Adapter) -> tuple[str, str, float]:
    return os.path.abspath(os.path.expanduser(adapter.path)), adapter.sha256, adapter.scale


def _plain(record: PromptRecord) -> list[Any]:
    """A record as `serve` reads it: without `meta`, which is the job's alone."""
    return [
        *(record.id, record.prompt, record.seed, record.width, record.height, record.num_inference_steps),
        *(record.guidance_scale, record.line, {}, record.text_tokens, record.text_length),
        *(record.negative_prompt, record.true_cfg_scale),
    ]
