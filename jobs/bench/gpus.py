"""One job on more and more GPUs, or CPU workers: images/s beside those of one, and what a killed worker costs.

    python -m jobs.bench.gpus prompts.jsonl --model random:flux-dev --batch-size 16 --limit 128 --gpus 1,2
    python -m jobs.bench.gpus prompts.jsonl --model random:flux-dev --batch-size 16 --workers 1,2 --ray local
    python -m jobs.bench.gpus demo --model tiny --workers 1,2

Every count runs once to fill the caches, in a directory that is thrown away, and `--rounds` times by turns. With
`--kill` the last count runs once more, and loses a worker when half of the images are made; on a Ray cluster nothing is
killed here.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any


def run(words: list[str], kill_at: int | None = None) -> dict[str, Any]:
    """A job's row in runs.jsonl; at so many images one of its workers is killed."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job"
        running = subprocess.Popen([sys.executable, "-m", "fluxcli", "batch", *words, "-o", str(job)])
        while running.poll() is None:
            time.sleep(0.2)
            if kill_at is not None and made(job) >= kill_at:
                os.kill(workers(running.pid)[-1], signal.SIGKILL)
                kill_at = None
        if running.returncode:
            sys.exit(running.returncode)
        assert kill_at is None, "the job was over before a worker could be killed"
        row: dict[str, Any] = json.loads((job / "runs.jsonl").read_text().splitlines()[-1])
        return row


def made(job: Path) -> int:
    path = job / "manifest.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def workers(parent: int) -> list[int]:
    """Processes that a process started."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    each = [worker["images_per_s"] for worker in row["workers"]]
    return {
        "images": row["images"],
        "seconds": row["seconds"],
        "images_per_s": row["images_per_s"],
        "each": each,
        "busy": [worker["busy"] for worker in row["workers"]],
        "deaths": sum(worker["deaths"] for worker in row["workers"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("--model", default="random:flux-dev")
    parser.add_argument("--batch-size", default="16")
    parser.add_argument("--limit", default="128")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--gpus", help="counts, like 1,2,4")
    kind.add_argument("--workers", help="counts, like 1,2")
    parser.add_argument("--ray", help="run those workers on this Ray cluster, with a GPU each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", action="store_true")
    asked = parser.parse_args()
    option, counts = ("--gpus", asked.gpus) if asked.gpus else ("--workers", asked.workers)
    shared = [asked.input, "-m", asked.model, "--batch-size", asked.batch_size, "--limit", asked.limit]
    if asked.ray and (asked.gpus or asked.kill):
        parser.error("--ray goes with --workers alone")
    shared += ["--ray", asked.ray] if asked.ray else [] if asked.gpus else ["--device", "cpu"]
    commands = {count: [*shared, option, count] for count in counts.split(",")}
    for words in commands.values():
        run(words)
    rows: dict[str, list[dict[str, Any]]] = {count: [] for count in commands}
    for _ in range(asked.rounds):
        for count, words in commands.items():
            rows[count].append(run(words))
    first, *_, last = commands
    rate = {count: median(row["images_per_s"] for row in rows[count]) for count in rows}
    result = {
        "device": rows[first][0]["device"],
        "versions": rows[first][0]["versions"],
        "rounds": {count: [figures(row) for row in rows[count]] for count in rows},
        "images_per_s": rate,
        "times_one": {count: round(rate[count] / rate[first], 3) for count in rate},
    }
    if asked.kill:
        result["killed"] = figures(run(commands[last], int(asked.limit) // 2))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
