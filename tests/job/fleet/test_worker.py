"""What a worker says is held to what it was given, whatever it says."""

import json
import socket
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxcli import __version__
from fluxcli.core.errors import FluxcliError
from fluxcli.core.records import Batch, PromptRecord, ShapeKey
from fluxcli.job.fleet.deadlines import Deadlines, Patience
from fluxcli.job.fleet.process import Spawned
from fluxcli.job.fleet.wire import Garbage, Wire
from fluxcli.job.fleet.worker import LastWords, Worker
from fluxcli.job.output.sink import FileSink
from fluxcli.job.run.lanes import Failed, Made

KEY = ShapeKey(2, 64, 64, 64)
RECORDS = [PromptRecord(f"p{n}", "a", 2**64 - 1, 64, 64, 2, 3.5, n, {"mine": n}, 3, 64) for n in range(2)]
READY = {"kind": "ready", "version": __version__, "device": "seed", "host": "here"}


class Line:
    """A process that is a line alone."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.wire, self.other = Wire(ours), Wire(theirs)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    (tmp_path / "images").mkdir()
    made = Worker(
        *(0, "worker 0", lambda before: cast(Any, Line()), {"kind": "start"}, lambda record: f"images/{record.id}.png"),
        *(FileSink(tmp_path, ".png"), Deadlines(Patience()), lambda text: None, lambda one: None),
    )
    made.start()
    made.hear(READY)
    made.submit(Batch(7, KEY, 2, RECORDS))
    return made


def line(worker: Worker) -> Wire:
    process: Spawned | None = worker.process
    return cast(Any, process).other


def done(worker: Worker, **changes: Any) -> dict[str, Any]:
    """What an honest worker says after making its batch."""
    told = []
    while not (lease := next((each for each in line(worker).receive() if each["kind"] == "lease"), None)):
        pass
    for file_name, temporary in lease["places"]:
        assert worker._sink is not None
        written = worker._sink.put(file_name, b"image", temporary)
        told.append(
            {
                **{"sha256": written.sha256, "size": 5, "finished_at": written.finished_at},
                **{"seconds": 0.1, "comment_truncated": False},
            }
        )
    return {"kind": "done", "lease": 7, "timing": [0.1, 0.2, 0.3], "saved": told, **changes}


def test_a_record_travels_whole_but_for_what_is_the_jobs_alone(worker: Worker) -> None:
    (_, lease) = line(worker).receive()
    assert [PromptRecord(*record) for record in lease["records"]] == [
        PromptRecord(each.id, each.prompt, each.seed, 64, 64, 2, 3.5, each.line, {}, 3, 64) for each in RECORDS
    ]


def test_an_honest_worker_is_believed(worker: Worker) -> None:
    made = worker.hear(done(worker))
    assert isinstance(made, Made) and made.worker == 0 and worker.idle
    assert [saved.image.file_name for saved in made.saved()] == ["images/p0.png", "images/p1.png"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes",
    [
        {"lease": 8},
        {"lease": None},
        {"lease": [7]},
        {"timing": [0.1, 0.2]},
        {"timing": [0.1, 0.2, -1]},
        {"timing": [0.1, 0.2, float("nan")]},
        {"timing": None},
        {"saved": []},
        {"saved": None},
        {"saved": [{}, {}]},
        {"saved": [{"error": "bad_luck", "message": "x"}] * 2},
    ],
)
def test_what_is_not_so_is_garbage(changes: dict[str, Any], worker: Worker) -> None:
    with pytest.raises(Garbage):
        worker.hear(done(worker, **changes))
    assert not worker.idle


@pytest.mark.parametrize(
    ("name", "value"),
    [("sha256", "x"), ("sha256", None), ("size", 4), ("finished_at", "today"), ("finished_at", 5), ("seconds", "x")],
)
def test_an_image_that_is_not_as_it_is_told_is_garbage(name: str, value: Any, worker: Worker) -> None:
    message = done(worker)
    message["saved"][1][name] = value
    with pytest.raises(Garbage):
        worker.hear(message)


def test_a_worker_of_another_version_ends_the_job(worker: Worker) -> None:
    with pytest.raises(FluxcliError, match=r"worker 0 runs fluxcli 0\.0\.9, this job"):
        worker.hear({**READY, "version": "0.0.9"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KINDS = st.sampled_from(["ready", "said", "warmed", "made", "done", "failed", "ending", "other"])
KEYS = ("lease", "timing", "saved", "text", "key", "seconds", "error", "message", "limit", "fault", "disk", "version")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=KINDS, about=st.dictionaries(st.sampled_from(KEYS), VALUES | st.just(7), max_size=6))
def test_nothing_that_a_worker_says_is_an_error_of_the_jobs_own(worker: Worker, kind: str, about: Any) -> None:
    message = json.loads(json.dumps({"kind": kind, **about}))
    try:
        told = worker.hear(message)
    except (Garbage, LastWords):
        return
    except FluxcliError as error:
        assert "it was installed anew" in str(error)
        return
    assert told is None or (isinstance(told, Failed) and kind == "failed" and about["lease"] == 7)
    if isinstance(told, Failed):
        worker.submit(Batch(7, KEY, 2, RECORDS))
