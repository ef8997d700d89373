"""`python -m fluxcli.job.fleet.cluster.driver`: the process of a job that talks to Ray, and the only one that imports
it. To the job each actor looks like a worker process of its own: a line that says what a worker says.

Ray takes over what belongs to its process: a signal, stdout, threads; and it unpickles what its actors send, as they do
what it sends: who can reach a Ray cluster can run code on it. So it is here, and what the job gets from here is JSON.
"""

import contextlib
import errno
import importlib.util
import json
import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before ray is imported
os.environ["RAY_USAGE_STATS_PROMPT_ENABLED"] = "0"

import ray
from ray.exceptions import RayError

from fluxcli.core.terminal import printable_line
from fluxcli.job.fleet.cluster.actor import CALLS, Actor, versions
from fluxcli.job.fleet.wire import Garbage, Message, Wire, message_of
from fluxcli.job.output.sink import ROOT, FileSink

_OBJECTS = 2**28  # bytes of memory for what travels, of a cluster that is this machine alone
_PLACED = 10.0  # seconds after which a worker without a place is told of
_LONGEST = 2**24  # characters of a message
_CAUSE = re.compile(r"because (.+?)\.\s").search


class _Refused(Exception):
    """A worker that no other start would cure."""


class _Disk(Exception):
    """The job's disk cannot be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.about = (error.errno or errno.EIO, error.strerror or str(error), str(error.filename or ""))


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _Disk(error) from error


class _Lane:
    """One worker: what its job says goes to the actor, what the actor says to the job."""

    def __init__(self, about: Message, end: socket.socket) -> None:
        self._module, self._name = about["module"], about["name"]
        self._wire, self._telling = Wire(end), threading.Lock()
        self._revoked = False  # the job has taken back what it held
        self._places: dict[int, list[list[str]]] = {}  # file name and temporary of each image, by lease
        self._sink: FileSink | None = None  # where images are put that the worker sends
        self._discard: Callable[[], None] = lambda: None  # removes the probe
        needs = {"num_gpus": 1} if about["gpu"] else {}
        self._actor: Any = (
            ray.remote(Actor)
            .options(
                **{"name": f"fluxcli {self._name}, start {about['start']}", "num_cpus": 1, **needs},
                **{"max_restarts": 0, "max_task_retries": 0, "max_concurrency": CALLS, "scheduling_strategy": "SPREAD"},
            )
            .remote()
        )
        threading.Thread(target=self._down, daemon=True).start()

    def _down(self) -> None:
        """Until the job hangs up: then nothing more is written for it, and the actor ends."""
        with contextlib.suppress(EOFError):
            while True:
                for message in self._wire.receive():
                    self._pass_on(message)
        with contextlib.suppress(Exception):  # where the cluster is lost there is nothing to end
            ray.kill(self._actor, no_restart=True)
        with self._telling:
            self._revoked = True
        self._forget_probe()
        self._wire.close()

    def _pass_on(self, message: Message) -> None:
        if message["kind"] == "start":
            threading.Thread(target=self._up, args=(message,), daemon=True).start()
            return
        if message["kind"] == "lease":
            self._places[message["index"]] = message["places"]
        self._actor.tell.remote(json.dumps(message))

    def _up(self, start: Message) -> None:
        try:
            self._begin(start)
            while frames := ray.get(self._actor.hear.remote()):
                for text, images in frames:
                    self._say(text, images)
        except _Refused as error:
            self._end(str(error), "user")
        except _Disk as error:
            self._end(str(error), "disk", error.about)
        except Garbage as error:
            self._end(f"sent {error}", "device")
        except Exception as error:  # whatever Ray may raise; where the cluster is lost, not its own kind alone
            if "owner has died" in (reason := cause(error)):
                print("this machine has left it", file=sys.stderr, flush=True)
                os._exit(1)  # the owner is this process: nothing can be started from here any more
            self._end(reason, "device")
        with self._telling:
            if not self._revoked:
                self._wire.hang_up()

    def _begin(self, start: Message) -> None:
        images = start["images"]
        looking = self._actor.look.remote(images, self._probe(images))
        if not ray.wait([looking], timeout=_PLACED)[0]:
            self._tell({"kind": "said", "text": "waits for a place in the cluster"})
        there = self._there(looking)
        self._forget_probe()
        for package, version in versions().items():
            if (other := there["versions"].get(package)) != version:
                raise _Refused(
                    f"{self._name} on {there['host']} has {package} {other}, this job {version}: images depend on it; "
                    "install the same on every machine"
                )
        if not there["sees"]:
            self._sink = FileSink(Path(images["directory"]), images["suffix"])
            told = f"{there['host']} does not see {images['directory']}: its images are sent through Ray"
            self._tell({"kind": "said", "text": told})
        ray.get(self._actor.begin.remote(self._module, json.dumps(start), not there["sees"]))

    def _probe(self, images: dict[str, Any] | None) -> tuple[str, str] | None:
        """A file in the job's directory for the actor to find, and its SHA-256."""
        if images is None:
            return None
        data = secrets.token_bytes(32)
        sink = FileSink(Path(images["directory"]), images["suffix"])
        with self._telling, _writing():
            if self._revoked:
                return None
            written = sink.put(f"{ROOT}probe{images['suffix']}", data)
            self._discard = partial(sink.discard, written.temporary)
        return written.temporary, written.sha256

    def _forget_probe(self) -> None:
        with self._telling, contextlib.suppress(OSError):
            self._discard()

    def _there(self, looking: Any) -> dict[str, Any]:
        try:
            there = json.loads(ray.get(looking))
        except RayError as error:
            # An error of the actor's own making, not its death: it was never one of ours.
            if getattr(error, "_actor_init_failed", False) or not isinstance(error, ray.exceptions.RayActorError):
                raise _Refused(
                    f"{self._name}: fluxcli cannot be started there: {cause(error)}. It must be installed on every "
                    "machine of the cluster, as here"
                ) from None
            raise
        if not isinstance(there, dict):
            raise Garbage("no account of itself")
        return there

    def _say(self, text: str, images: list[bytes]) -> None:
        if type(text) is not str or len(text) > _LONGEST:
            raise Garbage("no message")
        message = message_of(text.encode())
        if message["kind"] in ("done", "failed"):
            try:
                places = self._places.pop(message["lease"])
                if message["kind"] == "done" and self._sink is not None:
                    self._put(places, message["saved"], images)
                    return self._tell(message)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise Garbage("images that cannot be meant") from error
        self._tell(message)

    def _put(self, places: list[list[str]], saved: list[Message], images: list[bytes]) -> None:
        """Images that were sent, on disk for sure, each under the name that it was given."""
        assert self._sink is not None
        made = [(place, told) for place, told in zip(places, saved, strict=True) if "error" not in told]
        for ((file_name, temporary), told), data in zip(made, images, strict=True):
            if type(data) is not bytes:
                raise ValueError("no image")
            with self._telling, _writing():
                if self._revoked:
                    return
                written = self._sink.put(file_name, data, temporary)
            told.update(sha256=written.sha256, size=len(data), finished_at=written.finished_at)

    def _end(self, message: str, fault: str, disk: tuple[int, str, str] | None = None) -> None:
        self._tell({"kind": "ending", "message": message, "fault": fault, "disk": disk})

    def _tell(self, message: Message) -> None:
        with self._telling:
            if not self._revoked:
                self._wire.send(message)


def cause(error: Exception) -> str:
    """Why an actor is no more, in a line. Ray says it in many."""
    text = str(error)
    if getattr(error, "_actor_init_failed", False) or not isinstance(error, ray.exceptions.RayActorError):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return printable_line(lines[-1] if lines else type(error).__name__)[:300]
    known = _CAUSE(text)
    return printable_line(known[1] if known else text.splitlines()[0])[:300]


def connect(address: str, cpus: int | None) -> Message:
    """Joins a cluster, or starts one of this machine alone; what there is in it."""
    # What Ray adds to the path of the workers: where fluxcli is, instead of whatever directory this is.
    found = importlib.util.find_spec("fluxcli")
    assert found is not None and found.origin is not None
    os.chdir(Path(found.origin).parent.parent)
    own: dict[str, Any] = {}
    if address == "local":
        own = {"include_dashboard": False, "object_store_memory": _OBJECTS, "num_cpus": cpus}
        own["_node_ip_address"] = "127.0.0.1"
    ray.init(address, log_to_driver=False, logging_level="CRITICAL", **own)
    there = ray.cluster_resources()
    return {"kind": "cluster", "gpus": int(there.get("GPU", 0)), "cpus": int(there.get("CPU", 0))}


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(control.fileno(), False)
    asked = json.loads(control.recv(2**16))
    try:
        told = connect(asked["address"], asked["cpus"])
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        told = {"kind": "error", "message": printable_line(" ".join(str(error).split()))[:300]}
    control.send(json.dumps(told).encode())
    lanes = []
    while True:
        data, ends, *_ = socket.recv_fds(control, 2**16, 1)
        if not data:
            break
        lanes.append(_Lane(json.loads(data), socket.socket(fileno=ends[0])))
    ray.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
