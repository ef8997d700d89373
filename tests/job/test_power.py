"""The power may go at any moment: what the job told to be committed is there at the next start, once, and nothing is
torn, refused or left behind."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fluxcli.core.errors import FluxcliError
from fluxcli.job.output import sink
from fluxcli.job.output.store import JobStore
from fluxcli.job.report.repair import alone, repair
from fluxcli.job.report.verify import verify
from tests.conftest import read_rows
from tests.job import harness, power

ROWS = 7
JOB = Path("new", "job")  # below a directory that the job makes too
CHANGING = ("timing", "run", "finished_at", "batch", "file_name")


@dataclass(frozen=True)
class Scenario:
    """What a job goes through before the power goes: `before` it all, undisturbed; then `starts`, each in a process of
    its own. `per_folder` images fit a directory; `bad` are rows that fail."""

    starts: tuple[Callable[[Path, Path], Any], ...]
    before: Callable[[Path, Path], list[str]] | None = None
    per_folder: int = 10_000
    bad: int = 0


def killed(step: str, file: str, number: int, rows: Path, directory: Path) -> None:
    """Runs, and dies before the `number`-th call of `step` on a file."""
    calls, real = 0, getattr(os, step)

    def fatal(descriptor: int, *args: Any) -> Any:
        nonlocal calls
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(file):
            calls += 1
            if calls == number:
                harness.die()
        return real(descriptor, *args)

    setattr(os, step, fatal)
    harness.run(rows, directory)


def part(rows: Path, directory: Path) -> list[str]:
    """A job killed amid its second append, in a way that leaves all there is to leave."""
    harness.forked(lambda: killed("write", "manifest.jsonl", 2, rows, directory))
    (directory / "images" / ".p9.png.0123abcd.tmp").write_bytes(b"half")
    with (directory / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"id": "p9", "prom')
    return [row["id"] for row in read_whole(directory)]


def damaged(rows: Path, directory: Path) -> list[str]:
    """A job of which an image is gone, one is cut short and a row is doubled."""
    harness.run(rows, directory)
    (directory / "images" / "p2.png").unlink()
    (directory / "images" / "p4.png").write_bytes(b"")
    manifest = directory / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes() + manifest.read_bytes().splitlines(keepends=True)[0])
    return sorted({row["id"] for row in read_whole(directory)} - {"p2", "p4"})


def mended(rows: Path, directory: Path) -> None:
    with alone(directory):
        repair(verify(directory))


SCENARIOS = {
    "first start": Scenario((harness.run,)),
    "resumed after a kill": Scenario((harness.run,), before=part),
    "killed, resumed": Scenario((partial(killed, "write", "manifest.jsonl", 2), harness.run)),
    "killed before a row was on disk for sure, resumed": Scenario(
        (partial(killed, "fsync", "manifest.jsonl", 2), harness.run)
    ),
    "killed before the manifest was, resumed": Scenario((partial(killed, "fsync", "manifest.jsonl", 1), harness.run)),
    "several directories of images": Scenario((harness.run,), per_folder=2),
    "bad rows": Scenario((harness.run,), bad=3),
    "the manifest is written anew": Scenario((harness.run,), before=damaged),
    "repaired, resumed": Scenario((mended, harness.run), before=damaged),
}


def read_whole(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"}\n")]


def write_input(path: Path, bad: int) -> Path:
    harness.write_input(path, ROWS)
    with path.open("a") as file:
        file.writelines(json.dumps({"prompt": "x", "id": f"b{i}", "width": 1}) + "\n" for i in range(bad))
    return path


def recorded(scenario: Scenario, rows: Path, home: Path) -> tuple[list[power.Op], int]:
    """What the scenario does to the disk, and how many operations it begins with."""
    root, log = home / "root", home / "log"
    root.mkdir()
    log.touch()
    ready = scenario.before(rows, root / JOB) if scenario.before else []
    power.snapshot(root, log, ready)
    first = len(power.read(log))

    def record(start: Callable[[Path, Path], Any]) -> None:
        sink.FILES_PER_DIRECTORY = scenario.per_folder
        recorder = power.Recorder(root, log)
        commit = JobStore.commit

        def committing(self: JobStore, written: Any, new: Any) -> None:
            commit(self, written, new)
            recorder.told([row.id for row in new])

        JobStore.commit = committing  # type: ignore[method-assign]
        recorder.start()
        start(rows, root / JOB)
        if start is harness.run:
            recorder.told([f"p{i}" for i in range(ROWS)])

    for start in scenario.starts:
        assert harness.forked(partial(record, start)) == (-9 if isinstance(start, partial) else 0)
    return power.read(log), first


def resumed(scenario: Scenario, rows: Path, directory: Path) -> dict[str, Any]:
    """What a start makes of a state; asked in a process of its own."""
    read_end, write_end = os.pipe()

    def work() -> None:
        sink.FILES_PER_DIRECTORY = scenario.per_folder
        os.fsync = lambda descriptor: None  # type: ignore[assignment] # no power cut comes any more
        engine = harness.SeedEngine()
        found: dict[str, Any] = {"refused": None}
        try:
            found["status"] = harness.run(rows, directory, engine)
        except FluxcliError as error:
            found["refused"] = str(error)
        found["made"] = [id for ids in engine.batches for id in ids]
        found["ids"] = [row["id"] for row in harness.manifest(directory)]
        found["rows"] = essence(directory)
        found["problems"] = [f"{problem.kind} {problem.file_name}" for problem in verify(directory).problems]
        found["stray"] = [path.name for path in directory.rglob(".*")]
        found["failed"] = sorted({row["id"] for row in read_rows(directory / "failures.jsonl")})
        os.write(write_end, json.dumps(found).encode())

    ended = harness.forked(work)
    os.close(write_end)
    with open(read_end, "rb") as file:
        data = file.read()
    assert ended == 0, "a start that dies of a state"
    found: dict[str, Any] = json.loads(data)
    return found


def essence(directory: Path) -> dict[str, Any]:
    return {
        row["id"]: {key: value for key, value in row.items() if key not in CHANGING}
        for row in harness.manifest(directory)
    }


def faults(scenario: Scenario, home: Path, share: float = 1.0) -> tuple[int, Counter[str], list[str]]:
    """How many states were tried, what went wrong how often, and each fault in words."""
    rows = write_input(home / "rows.jsonl", scenario.bad)
    status = harness.run(rows, home / "undisturbed")
    expected = essence(home / "undisturbed")
    ops, first = recorded(scenario, rows, home)
    tried, counts, told = 0, Counter[str](), []
    for cut, what, disk in power.states(ops, first, share):
        disk.write_to(home / "state")
        found = resumed(scenario, rows, home / "state" / JOB)
        tried += 1
        wrong = {
            "lost": sorted(set(found["made"]) & power.told(ops, cut)),
            "doubled": [id for id, count in Counter(found["ids"]).items() if count > 1],
            "torn": [id for id in expected if found["rows"].get(id) != expected[id]],
            "refused": [found["refused"]] if found["refused"] or found["status"] != status else [],
            "problems": found["problems"],
            "left behind": found["stray"],
            "failures": set(found["failed"]) ^ {f"b{i}" for i in range(scenario.bad)},
        }
        for kind, whose in wrong.items():
            if whose:
                counts[kind] += 1
                told.append(f"before operation {cut} ({ops[cut - 1][:2]}), {what}: {kind} {whose}")
    return tried, counts, told


@pytest.mark.parametrize("name", ["killed before a row was on disk for sure, resumed", "several directories of images"])
def test_a_power_cut_now_and_then(name: str, tmp_path: Path) -> None:
    tried, counts, told = faults(SCENARIOS[name], tmp_path, share=0.01)
    assert tried and not counts, told[:5]


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_power_cut_at_any_moment(name: str, tmp_path: Path) -> None:
    tried, counts, told = faults(SCENARIOS[name], tmp_path)
    print(f"{name}: {tried} states")
    assert tried > 50 and not counts, (tried, counts, told[:10])
