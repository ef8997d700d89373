"""A Ray cluster as a job sees it: how many workers it has room for, and each of those as a process with a line."""

import contextlib
import json
import os
import re
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

from fluxcli.core.errors import FluxcliError, UsageError
from fluxcli.core.terminal import printable_line
from fluxcli.job.fleet.wire import Wire

_ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})").fullmatch
_ANSWERS = 5.0  # seconds for a cluster's machine to answer at all
_JOINED = 60.0  # seconds to join it, or to start one
_LEAVING = 10.0
_LONGEST = 2**24  # bytes of a message
_TAIL = 2**12


class Cluster:
    """Joined by a process of its own (`driver`), which ends with this one.

    Args:
        address: HOST:PORT of its head, "auto" for the one that this machine is part of, "local" to start one here.
        cpus: how many it is to have, where it is started here.

    Raises:
        UsageError: no address, or Ray is not installed.
        FluxcliError: there is no cluster.
    """

    def __init__(self, address: str, cpus: int | None = None) -> None:
        self.address = address
        self._check()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, closed in `close`
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A secret of its own, instead of the one that Ray would leave in the home directory for every later cluster.
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} if address == "local" else {}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fluxcli.job.fleet.cluster.driver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **own},
                start_new_session=True,
            )
        self._control.send(json.dumps({"address": address, "cpus": cpus}).encode())
        try:
            told = json.loads(self._answer())
            if told["kind"] != "cluster":
                raise FluxcliError(f"--ray {address}: {told['message']}")
        except BaseException:
            self.close()
            raise
        self.gpus, self.cpus = told["gpus"], told["cpus"]

    def _check(self) -> None:
        if find_spec("ray") is None:
            raise UsageError("--ray needs Ray, which fluxcli[ray] brings: install that here and on every machine")
        if self.address in ("auto", "local"):
            return
        match = _ADDRESS(self.address)
        if match is None:
            raise UsageError(
                f"--ray {self.address}: give auto, local, or the HOST:PORT of the cluster's head, as ray start shows "
                "it; the job runs on one of the cluster's machines"
            )
        try:
            socket.create_connection((match["host"].strip("[]"), int(match["port"])), _ANSWERS).close()
        except (OSError, OverflowError) as error:
            raise FluxcliError(f"--ray {self.address}: no cluster answers there: {error}") from error

    def _answer(self) -> bytes:
        if not select.select([self._control], [], [], _JOINED)[0]:
            raise FluxcliError(f"--ray {self.address}: no cluster answers in {_JOINED:.0f} s")
        data = self._control.recv(2**16)
        if not data:
            self._process.wait(_LEAVING)
            raise FluxcliError(f"--ray {self.address}: {self._last_words()}")
        return data

    def spawn(self, module: str, name: str, start: int, gpu: bool) -> "Remote":
        """A worker that runs `module`, with a GPU of its own or on a CPU.

        Raises:
            FluxcliError: the cluster is lost.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            about = {"module": module, "name": name, "start": start, "gpu": gpu}
            try:
                socket.send_fds(self._control, [json.dumps(about).encode()], [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise FluxcliError(
                    f"--ray {self.address}: the cluster is lost: {self._last_words()}. Nothing committed is lost; run "
                    "again to go on"
                ) from error
        return Remote(ours, self)

    def status(self) -> int | None:
        """How the process ended that speaks for the cluster; None while it runs."""
        return self._process.poll()

    def close(self) -> None:
        """Leaves it, and stops it where it was started here."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_LEAVING)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _last_words(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _TAIL))
        lines = [line.strip() for line in self._output.read().decode(errors="replace").splitlines() if line.strip()]
        return printable_line(lines[-1])[:300] if lines else "no answer"


class Remote:
    """A worker on the cluster, with what a `Process` has."""

    words = None  # what it prints is in Ray's logs

    def __init__(self, end: socket.socket, cluster: Cluster) -> None:
        end.setblocking(False)
        self._end, self._cluster, self._ended = end, cluster, False
        self.wire = Wire(end, _LONGEST)

    def listen(self) -> bool:
        return False

    def end(self, patience: float = 0.0) -> int | None:
        """Ends it: when this returns nothing more is written for it from here, and its actor is being killed."""
        if not self._ended:
            self._ended = True
            self.wire.hang_up()
            until = time.monotonic() + _LEAVING
            with contextlib.suppress(OSError):
                while select.select([self._end], [], [], max(0.0, until - time.monotonic()))[0]:
                    if not self._end.recv(2**16):
                        break
        return self._cluster.status() or 0

    def close(self) -> None:
        self.wire.close()

    def last_words(self) -> str:
        return ""
