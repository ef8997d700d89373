"""Writes the tables of docs/figures.md from the recorded results, `bench-*.json` (of `fluxcli bench`) and
`step-cache-*.json` (of `jobs/bench/step_cache.py`), each between two comments of it. A test says whether it is up to
date.

    python -m jobs.bench.figures
"""

import json
from collections.abc import Sequence
from pathlib import Path

from fluxcli.bench import table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "figures.md"
RESULTS = ROOT / "jobs" / "bench" / "results"
BEGIN, END = "<!-- figures: written by jobs/bench/figures.py -->", "<!-- end of figures -->"
_COLUMNS = {"name", "steps", "evaluated", "mask", "grey_levels", "psnr", "error"}  # the rest are kinds of prompts
CACHE_BEGIN, CACHE_END = "<!-- step cache: written by jobs/bench/figures.py -->", "<!-- end of step cache -->"


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


def step_cache(paths: Sequence[Path]) -> str:
    """What the step cache costs in pictures, as Markdown: every preset above the plain run of equal cost."""
    parts = []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        told = path.relative_to(ROOT).as_posix()
        if kinds := [key for key in result["rows"][0] if key not in _COLUMNS]:
            parts.append(f"{result['model']}, {result['steps']} steps, {result['images']} unseen prompts (`{told}`):")
            head = ["", "evaluated", *(f"right, {kind}" for kind in kinds), "grey levels from the full run", "PSNR, dB"]
            body = [
                [row["name"], str(row["evaluated"]), *(f"{row[kind]:.1%}" for kind in kinds),
                 f"{row['grey_levels']:.3f}", f"{row['psnr']:.1f}" if row["psnr"] else "-"]
                for row in result["rows"]
            ]  # fmt: skip
        else:
            parts.append(
                f"{result['model']}, {result['dtype']}, {result['shape']}, {result['steps']} steps (`{told}`):"
            )
            head = ["", "evaluated", "relative error of latents"]
            body = [[row["name"], str(row["evaluated"]), f"{row['error']:.4f}"] for row in result["rows"]]
        parts.append(markdown([head, *body]))
    return "\n\n".join(parts)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *body))


def written(page: str, figures: str, begin: str = BEGIN, close: str = END) -> str:
    """The page with these figures in the place of its own."""
    before, _, rest = page.partition(begin)
    _, end, after = rest.partition(close)
    if not end:
        raise ValueError(f"{PAGE.name} has no place for figures: it lacks {begin!r} and {close!r}")
    return f"{before}{begin}\n\n{figures}\n\n{close}{after}"


def up_to_date(page: str) -> str:
    """The page with all figures as they are recorded."""
    page = written(page, figures(recorded()))
    return written(page, step_cache(recorded("step-cache")), CACHE_BEGIN, CACHE_END)


def recorded(kind: str = "bench") -> list[Path]:
    return sorted(RESULTS.glob(f"{kind}-*.json"))


if __name__ == "__main__":
    PAGE.write_text(up_to_date(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
