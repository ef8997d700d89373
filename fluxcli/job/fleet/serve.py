"""The other end: a process that makes batches for the job that started it. It knows no rows and no commits: it is told
where images go, puts them there under names that mean nothing yet, and tells what it did."""

import errno
import os
import queue
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from fluxcli import __version__
from fluxcli.core.config import ImageFormat
from fluxcli.core.errors import DeviceError, FluxcliError, OutOfMemory, Remark
from fluxcli.core.records import Adapter, Batch, Failure, PromptRecord, ShapeKey
from fluxcli.job.fleet.wire import Message, Wire
from fluxcli.job.output.sink import FileSink, Written
from fluxcli.job.run.lanes import Engine, LocalLane, Made
from fluxcli.job.run.writing import Saved, Writer

_POLL = 0.005  # seconds between looks at the device while no batch waits
_SAVING = 2  # batches that may wait for their images to be saved: bounds this process's memory

Say = Callable[[str], None]
# From the settings of `Workers` and every shape of the job: an engine, and its device's name.
MakeEngine = Callable[[dict[str, Any], list[ShapeKey], Say], tuple[Engine, str]]


class Line(Protocol):
    """A worker's end of what it and its job say to each other."""

    def receive(self) -> list[Message]:
        """Waits for messages."""

    def send(self, message: Message) -> None:
        """A message may carry images, as a list of bytes under "data", where the line can."""

    def leave(self, status: int) -> None:
        """Ends this worker, or tells whoever can."""


class _Socket(Wire):
    """The line of a process of its own."""

    def leave(self, status: int) -> None:
        os._exit(status)  # every image is on disk, and a device's libraries take their time to leave


class _Disk(FluxcliError):
    """The disk cannot be written, which is the job's to tell."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.about = (error.errno or errno.EIO, error.strerror or str(error), str(error.filename or ""))


def serve(make_engine: MakeEngine) -> None:
    """Works until the job has no more, and leaves at once when it is gone."""
    descriptor = int(sys.argv[2])
    os.set_inheritable(descriptor, False)  # what this process starts must not keep its line to the job open
    Server(_Socket(socket.socket(fileno=descriptor))).run(make_engine)


class Server:
    """A worker.

    Args:
        keeps: its images go over the line, instead of to the disk.
    """

    def __init__(self, line: Line, keeps: bool = False) -> None:
        self._line, self._keeps, self._telling = line, keeps, threading.Lock()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._saving: queue.Queue[Made | None] = queue.Queue(_SAVING)
        self._places: dict[str, tuple[str, str]] = {}  # by the record's id
        self._sizes: dict[str, int] = {}  # bytes of an image, by its temporary
        self._kept: dict[str, bytes] = {}  # images that go over the line, by their temporaries
        self._warm: set[ShapeKey] = set()
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def run(self, make_engine: MakeEngine) -> None:
        try:
            self._run(make_engine)
        except BaseException as error:
            self._last_words(error)
        else:
            self._line.leave(0)

    def _run(self, make_engine: MakeEngine) -> None:
        start = self._inbox.get()
        warnings.simplefilter("ignore")  # as on the command line
        warnings.simplefilter("once", Remark)
        warnings.showwarning = lambda message, *where: self._say(f"Warning: {message}")
        shapes = [ShapeKey(*key) for key in start["shapes"]]
        engine, device = make_engine(start["settings"], shapes, self._say)
        images = start["images"] or {"directory": "", "suffix": "", "format": (), "model": "", "encoders": 1}
        self._sink = FileSink(Path(images["directory"]), images["suffix"])
        writer = Writer(ImageFormat(*images["format"]), images["model"], self._write, images["encoders"])
        saver = threading.Thread(target=self._save, name="save", daemon=True)
        saver.start()
        self._tell("ready", version=__version__, device=device, host=socket.gethostname())
        with LocalLane(engine, writer, lambda record: self._places.pop(record.id), self._say) as lane:
            self._work(lane)
            self._saving.put(None)
            saver.join()

    def _last_words(self, error: BaseException) -> None:
        traceback.print_exception(error)
        fault, disk = "device", None
        if isinstance(error, _Disk):
            fault, disk = "disk", error.about
        elif isinstance(error, FluxcliError) and not isinstance(error, DeviceError | OutOfMemory):
            fault = "user"
        message = str(error) if isinstance(error, FluxcliError) else f"{type(error).__name__}: {error}"
        self._tell("ending", message=message, fault=fault, disk=disk)
        self._line.leave(1)

    def _listen(self) -> None:
        try:
            while True:
                for message in self._line.receive():
                    if message["kind"] == "stop":
                        self._stopped.set()
                    self._inbox.put(message)
        finally:
            self._line.leave(1)  # the job is gone; what is half made is litter, which its next start clears away

    def _work(self, lane: LocalLane[tuple[str, str]]) -> None:
        while not self._stopped.is_set() or lane.busy:
            while lane.free() and not self._stopped.is_set():
                lease = self._next(lane)
                if lease is None:
                    break
                self._begin(lane, lease)
            self._settle(lane)

    def _next(self, lane: LocalLane[tuple[str, str]]) -> Message | None:
        """The next lease; None where something else is to be done first."""
        while True:
            try:
                message = self._inbox.get(timeout=_POLL if lane.busy else None)
            except queue.Empty:
                if lane.arrived():
                    return None
                continue
            return message if message["kind"] == "lease" else None

    def _begin(self, lane: LocalLane[tuple[str, str]], lease: Message) -> None:
        key = ShapeKey(*lease["key"])
        if key not in self._warm:
            while lane.busy:  # nothing runs while a shape is captured
                self._settle(lane)
            for one in lane.warm_up([key]):
                self._tell("warmed", **asdict(one))
            self._warm.add(key)
        adapters = tuple(Adapter(*each) for each in lease["adapters"])
        records = [replace(PromptRecord(*record), adapters=adapters) for record in lease["records"]]
        batch = Batch(lease["index"], key, lease["steps"], records, lease["mask"], adapters)
        if (len(records) or key.batch_size) > lane.limit(key):
            self._failed(lane, batch, "out_of_memory", f"no memory for {key}")
            return
        if not records:  # the shape was to be made ready, and no more
            self._tell("done", lease=batch.index, timing=(0, 0, 0), saved=[])
            return
        self._places.update(zip((record.id for record in records), map(tuple, lease["places"]), strict=True))
        lane.submit(batch)

    def _settle(self, lane: LocalLane[tuple[str, str]]) -> None:
        for each in lane.wait():
            if isinstance(each, Made):
                self._tell("made", lease=each.batch.index)
                self._saving.put(each)
            else:
                self._failed(lane, each.batch, each.kind, each.message)

    def _failed(self, lane: LocalLane[tuple[str, str]], batch: Batch, kind: str, message: str) -> None:
        for record in batch.records:
            self._places.pop(record.id, None)
        self._tell("failed", lease=batch.index, error=kind, message=message, limit=lane.limit(batch.key))

    def _write(self, place: tuple[str, str], data: bytes) -> Written:
        if self._keeps:
            self._kept[place[1]] = data
            return Written(place[1], place[0], "", "")  # its hash and time are made where it is put on a disk
        try:
            written = self._sink.put(place[0], data, place[1])
        except OSError as error:
            raise _Disk(error) from error
        self._sizes[written.temporary] = len(data)
        return written

    def _save(self) -> None:
        try:
            while (made := self._saving.get()) is not None:
                timing = (made.timing.encode_s, made.timing.denoise_s, made.timing.decode_s)
                images = made.saved()
                saved = [self._told(each) for each in images]
                self._tell("done", lease=made.batch.index, timing=timing, saved=saved, **self._bytes_of(images))
        except BaseException as error:
            self._last_words(error)

    def _told(self, saved: Saved | Failure) -> Message:
        if isinstance(saved, Failure):
            return {"error": saved.kind, "message": saved.message}
        about = {"seconds": saved.seconds, "comment_truncated": saved.comment_truncated}
        if self._keeps:
            return about
        image = saved.image
        size = self._sizes.pop(image.temporary)
        return {"sha256": image.sha256, "size": size, "finished_at": image.finished_at, **about}

    def _bytes_of(self, images: Sequence[Saved | Failure]) -> dict[str, list[bytes]]:
        if not self._keeps:
            return {}
        return {"data": [self._kept.pop(each.image.temporary) for each in images if isinstance(each, Saved)]}

    def _say(self, text: str) -> None:
        self._tell("said", text=text)

    def _tell(self, kind: str, **about: Any) -> None:
        with self._telling:
            self._line.send({"kind": kind, **about})
