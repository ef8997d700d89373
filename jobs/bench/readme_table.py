"""Writes the README's figures from the recorded results, `jobs/bench/results/bench-*.json` (what `fluxcli bench --json`
printed), between the README's two comments. A test says whether the README is up to date.

    python -m jobs.bench.readme_table
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fluxcli.bench import table

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "jobs" / "bench" / "results"
BEGIN, END = "<!-- figures: written by jobs/bench/readme_table.py -->", "<!-- end of figures -->"


def figures(paths: Sequence[Path]) -> str:
    """The tables of these results as Markdown."""
    parts = []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        parts.append(f"{table.headline(result)} (`{path.relative_to(ROOT).as_posix()}`):")
        if note := result.get("note"):
            parts[-1] = f"{parts[-1].removesuffix(':')}; {note}:"
        parts.append(markdown(table.step_rows(result)))
        if any("components" in row for row in result["shapes"]):
            parts.append(markdown(table.component_rows(result)))
        if line := table.parity_line(result):
            parts.append(f"{line[0].upper()}{line[1:]}.")
    return "\n\n".join(parts)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *body))


def written(readme: str, figures: str) -> str:
    """The README with these figures in the place of its own."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{README.name} has no place for figures: it lacks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def recorded() -> list[Path]:
    return sorted(RESULTS.glob("bench-*.json"))


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8"), figures(recorded())), encoding="utf-8")
