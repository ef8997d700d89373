"""What a start of a job did: counted while it runs, and written down as its row in runs.jsonl."""

import platform
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluxcli import __version__
from fluxcli.core.records import ShapeKey, Timing
from fluxcli.job.output.identity import Given
from fluxcli.job.output.sink import utc_now
from fluxcli.job.output.store import JobStore


@dataclass
class Totals:
    """What a run did."""

    images: int = 0
    failures: int = 0
    truncated: int = 0  # images whose prompt was cut
    rows: int = 0  # of the input
    done_before: int = 0
    skipped: int = 0  # rows that failed before, and are left alone
    seconds: float = 0.0
    warm_up_s: float = 0.0
    stages: dict[str, float] = field(
        default_factory=lambda: {"encode": 0.0, "denoise": 0.0, "decode": 0.0, "save": 0.0}
    )

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def add(self, timing: Timing) -> None:
        parts = (timing.encode_s, timing.denoise_s, timing.decode_s, timing.save_s)
        for stage, seconds in zip(self.stages, parts, strict=True):
            self.stages[stage] += seconds


@dataclass
class Run:
    """One start, from its opened directory to its row in runs.jsonl. `machine` is its device, dtype, quantization and
    versions."""

    store: JobStore
    machine: dict[str, Any]
    totals: Totals = field(default_factory=Totals)
    planned: int = 0
    shapes: Sequence[ShapeKey] = ()
    workers: Callable[[], list[dict[str, Any]]] = list  # what each process of its did
    argv: Sequence[str] = ()
    input: Given | None = None
    started_at: str = field(default_factory=utc_now)
    recorded: bool = False

    def record(self, exit_status: int) -> None:
        """Appends the row, once."""
        if self.recorded:
            return
        self.recorded = True
        totals, workers = self.totals, self.workers()
        self.store.record_run(
            {
                "host": socket.gethostname(),
                **self.machine,
                "versions": {
                    "fluxcli": __version__,
                    "python": platform.python_version(),
                    **self.machine["versions"],
                },
                **({"argv": [*self.argv]} if self.argv else {}),
                **({"input": self._input(self.input)} if self.input else {}),
                "started_at": self.started_at,
                "finished_at": utc_now(),
                "planned": self.planned,
                "shapes": [str(key) for key in self.shapes],
                "images": totals.images,
                "failures": totals.failures,
                "seconds": round(totals.seconds, 3),
                "warm_up_s": round(totals.warm_up_s, 3),
                "stages_s": {name: round(seconds, 3) for name, seconds in totals.stages.items()},
                "images_per_s": round(totals.images_per_s, 4),
                **({"workers": workers} if workers else {}),
                "exit_status": exit_status,
            }
        )

    @staticmethod
    def _input(given: Given) -> dict[str, Any]:
        return {"path": given.path, "sha256": given.sha256, "rows": given.rows}
