"""What a Ray actor is: a worker on some machine of a cluster, heard and told by calls from `driver`. No ray here."""

import hashlib
import importlib
import json
import os
import queue
import socket
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

from fluxcli import __version__
from fluxcli.job.fleet.serve import Server
from fluxcli.job.fleet.wire import Message
from fluxcli.job.output.sink import ROOT, FileSink

Frame = tuple[str, list[bytes]]  # a message's JSON, and the images that go with it
CALLS = 4  # at once: one that waits in `hear`, and those that must not wait for it


class Actor:
    """Its worker is a thread. No weights and no prompts but those of its batches come this way; each machine reads the
    model from its own disk."""

    def look(self, images: dict[str, Any] | None, probe: tuple[str, str] | None) -> str:
        """What is here, as JSON: the machine, its versions, and whether it sees the job's directory as the job does.

        Args:
            probe: a file that the job has written there, and its SHA-256.
        """
        sees = images is None or (probe is not None and _sees(images, *probe))
        return json.dumps({"host": socket.gethostname(), "versions": versions(), "sees": sees})

    def begin(self, module: str, start: str, keeps: bool) -> None:
        """Starts work.

        Args:
            module: has the function `engine`, as `serve` takes one.
            start: the job's first message.
            keeps: images are sent, not written.
        """
        self._line = Mailbox()
        self.tell(start)
        make_engine = importlib.import_module(module).engine
        threading.Thread(target=Server(self._line, keeps).run, args=(make_engine,), name="work", daemon=True).start()

    def tell(self, message: str) -> None:
        self._line.inbox.put(json.loads(message))

    def hear(self) -> list[Frame]:
        """Waits for what the worker says; nothing where it has left."""
        return self._line.said()


class Mailbox:
    """The line of a worker that is a thread."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()

    def receive(self) -> list[Message]:
        return [self.inbox.get()]

    def send(self, message: Message) -> None:
        data = message.pop("data", [])
        self._outbox.put((json.dumps(message), data))

    def leave(self, status: int) -> None:
        self._outbox.put(None)

    def said(self) -> list[Frame]:
        frames = []
        frame = self._outbox.get()
        while frame is not None:
            frames.append(frame)
            if self._outbox.empty():
                return frames
            frame = self._outbox.get()
        if frames:
            self._outbox.put(None)  # for the next who asks
        return frames


def versions() -> dict[str, str]:
    """What must be the same where a job is and where its workers are: the images depend on it."""
    packages = ("torch", "diffusers", "transformers")
    # Of torch 2.11.0+cu130 the release: a machine without a GPU has another build.
    return {"fluxcli": __version__, **{each: metadata.version(each).partition("+")[0] for each in packages}}


def _sees(images: dict[str, Any], probe: str, sha256: str) -> bool:
    sink = FileSink(Path(images["directory"]), images["suffix"])
    try:
        with open(sink.open(probe), "rb") as file:
            same = hashlib.sha256(file.read(64)).hexdigest() == sha256
        return same and os.access(sink.path(ROOT), os.W_OK | os.X_OK)
    except OSError:
        return False
    finally:
        sink.close()
