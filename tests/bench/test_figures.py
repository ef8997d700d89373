"""The tables of docs/figures.md are those of the recorded results."""

import pytest

from jobs.bench import figures


def test_the_page_shows_the_recorded_results() -> None:
    assert figures.recorded() and figures.recorded("step-cache")
    page = figures.PAGE.read_text(encoding="utf-8")
    assert page == figures.up_to_date(page), "run python -m jobs.bench.figures"


def test_figures_replace_figures_and_nothing_else() -> None:
    page = f"a\n{figures.BEGIN}\n\nold\n\n{figures.END}\nb"
    assert figures.written(page, "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="no place for figures"):
        figures.written("a page", "new")
