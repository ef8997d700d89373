"""Planning and resuming commute: whatever is done already, in whatever order the rest comes, the end is the same."""

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.job import harness
from tests.job.harness import SeedEngine

LENGTHS = [(64, 64), (64, 80), (96, 64)]


def rows_of(shapes: list[int]) -> list[dict]:
    return [
        {"id": f"r{i}", "prompt": f"picture {i}", "width": LENGTHS[shape][0], "height": LENGTHS[shape][1]}
        for i, shape in enumerate(shapes)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=st.lists(st.integers(0, 2), min_size=1, max_size=9),
    data=st.data(),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_part_first_then_all_is_all_at_once(shapes: list[int], data: st.DataObject, sizes: tuple[int, int]) -> None:
    rows = rows_of(shapes)
    part = data.draw(st.lists(st.sampled_from(rows), unique_by=lambda row: row["id"]))
    order = data.draw(st.permutations(rows))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        assert harness.run(write(home / "all.jsonl", rows), home / "at_once", batch_size=sizes[0]) == 0
        assert harness.run(write(home / "part.jsonl", part), home / "in_parts", batch_size=sizes[0]) == 0
        engine = SeedEngine()
        assert harness.run(write(home / "again.jsonl", order), home / "in_parts", engine, batch_size=sizes[1]) == 0
        made = [id for ids in engine.batches for id in ids]
        assert sorted(made) == sorted({row["id"] for row in rows} - {row["id"] for row in part})
        assert harness.essence(home / "in_parts") == harness.essence(home / "at_once")
