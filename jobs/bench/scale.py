"""How reading, planning and resuming grow from a thousand rows to a million: seconds, rows/s and peak memory.

Each figure comes from a process of its own. `--model` names any pipeline directory; only its tokenizers and configs are
read. `--prompts` is a text file of prompts to draw rows from. Resuming looks at a directory whose manifest and picture
files (one byte each) are all there (`directory_s`), and finds in a pass over the input that nothing is left to do.

    python jobs/bench/scale.py --model path/to/FLUX.1-dev --prompts prompts.txt --out result.json
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fluxcli.core.config import EngineConfig, ImageFormat
from fluxcli.core.records import PromptRecord, Timing
from fluxcli.job.input.read import PromptFile
from fluxcli.job.job import Job
from fluxcli.job.output.committed import record_settings
from fluxcli.job.output.rows import ManifestRow, write
from fluxcli.job.output.sink import FILES_PER_DIRECTORY
from fluxcli.job.output.store import JobStore
from fluxcli.models.checkpoints import resolve


def job(model: str, rows: Path, directory: Path) -> Job:
    checkpoint = resolve(model)
    config = EngineConfig("cuda:0", "bfloat16", True)  # plans as for a GPU; none is touched
    lengths = (64, 128, 256, 512)
    return Job(str(rows), directory, checkpoint, config, checkpoint.row_defaults(), lengths, ImageFormat(), 16)


def write_rows(path: Path, prompts: list[str], count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = f"{prompts[number % len(prompts)]} ({number})"
            file.write(json.dumps({"prompt": prompt, "source": "bench"}) + "\n")


def write_finished(made: Job, records: "list[PromptRecord]") -> None:
    """A directory in which every row is committed."""
    made.directory.mkdir()
    (made.directory / "job.json").write_text(json.dumps(made.identity))
    stamp = "2026-01-01T00:00:00.000Z"
    nanoseconds = 1767225600 * 10**9
    with (made.directory / "manifest.jsonl").open("wb") as manifest:
        for number, record in enumerate(records):
            shard = number // FILES_PER_DIRECTORY
            name = f"images/{shard:04d}/{record.id}.png" if shard else f"images/{record.id}.png"
            path = made.directory / name
            if number % FILES_PER_DIRECTORY == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
            os.utime(path, ns=(nanoseconds, nanoseconds))
            row = ManifestRow(
                id=record.id, file_name=name, sha256="0" * 64, **record_settings(record),
                text_tokens=record.text_tokens, text_length=record.text_length, truncated=False,
                batch={"index": number // 16, "size": 16, "slot": number % 16},
                timing=Timing(0.004, 3.01, 0.03, 0.09).as_row(), run=0, finished_at=stamp, meta={"source": "bench"},
            )  # fmt: skip
            manifest.write(write(row))


def measure(what: str, model: str, rows: Path, directory: Path) -> dict[str, Any]:
    made = job(model, rows, directory)
    start = time.perf_counter()
    if what == "plan":
        source = PromptFile(str(rows))
        intake, plan = made.preview(source)
        first = next(iter(plan))
        intake.records(first.rows)
        found = {"images": len(intake.groups), "batches": len(plan)}
    else:
        store = JobStore(directory, made.identity, ".png", print)
        found = {"images": store.images, "directory_s": round(time.perf_counter() - start, 3)}
        intake = made._take_in(PromptFile(str(rows)), store.status, print)
        assert (intake.done, len(intake.groups)) == (intake.rows, 0)
        store.close()
    seconds = time.perf_counter() - start
    return {
        **found,
        "seconds": round(seconds, 3),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--prompts", type=Path)
    arguments.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--measure", nargs=3, metavar=("WHAT", "ROWS", "DIRECTORY"), help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.measure:
        what, rows, directory = args.measure
        print(json.dumps(measure(what, args.model, Path(rows), Path(directory))))
        return
    prompts = args.prompts.read_text(encoding="utf-8").splitlines() if args.prompts else ["a photo of a bench"]
    results = []
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            rows, directory = Path(folder) / "rows.jsonl", Path(folder) / "job"
            write_rows(rows, prompts, count)
            figures: dict[str, Any] = {"rows": count}
            for what in ("plan", "resume"):
                if what == "resume":
                    made = job(args.model, rows, directory)
                    intake, _ = made.preview(PromptFile(str(rows)))
                    write_finished(made, (intake.records([image])[0] for image in range(count)))
                command = [sys.executable, __file__, "--model", args.model, "--measure", what, rows, directory]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                figures[what] = json.loads(done.stdout.splitlines()[-1])
            results.append(figures)
            print(
                f"{count:>8} rows: plan {figures['plan']['seconds']:7.2f} s, "
                f"{count / figures['plan']['seconds']:8.0f} rows/s, {figures['plan']['peak_mib']:5.0f} MiB; "
                f"resume {figures['resume']['seconds']:6.2f} s "
                f"(directory {figures['resume']['directory_s']:.2f} s), {figures['resume']['peak_mib']:5.0f} MiB",
                flush=True,
            )
    if args.out:
        args.out.write_text(
            json.dumps({"cpus": os.cpu_count(), "model": Path(args.model).name, "results": results}, indent=1) + "\n"
        )


main()
