"""The README's figures are those of the recorded results."""

import pytest

from jobs.bench import readme_table


def test_the_readme_shows_the_recorded_results() -> None:
    assert readme_table.recorded() and readme_table.recorded("step-cache")
    readme = readme_table.README.read_text(encoding="utf-8")
    assert readme == readme_table.up_to_date(readme), "run python -m jobs.bench.readme_table"


def test_figures_replace_figures_and_nothing_else() -> None:
    readme = f"a\n{readme_table.BEGIN}\n\nold\n\n{readme_table.END}\nb"
    assert readme_table.written(readme, "new") == readme.replace("old", "new")
    with pytest.raises(ValueError, match="no place for figures"):
        readme_table.written("a readme", "new")
