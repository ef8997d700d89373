"""What the documents say is there is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def test_architecture_names_every_room_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\S+)/` \|", text, re.M))
    rooms = {path.parent.relative_to(ROOT / "fluxcli").as_posix() for path in ROOT.glob("fluxcli/*/**/*.py")}
    assert named == rooms


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    inside = re.findall(r"`((?:tests|jobs|docs|fluxcli|core|cli|models|job|engine|bench)/[\w./-]+\.\w+)`", text)
    links = [path.parent / link for link in re.findall(r"\]\(([\w./-]+)\)", text)]
    assert all(target.exists() for target in links), links
    missing = [name for name in inside if not (ROOT / name).exists() and not (ROOT / "fluxcli" / name).exists()]
    assert not missing
