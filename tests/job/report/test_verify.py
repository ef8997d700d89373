"""`fluxcli verify` finds whatever is not as the manifest says, and --repair leaves just what the next run completes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fluxcli.core.errors import JobError
from fluxcli.core.files import json_line
from fluxcli.job.output.lock import Lock
from fluxcli.job.report.repair import alone, repair
from fluxcli.job.report.verify import verify
from tests.conftest import read_rows
from tests.faults import harness


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    rows = harness.write_input(tmp_path / "rows.jsonl")
    assert harness.run(rows, tmp_path / "job") == 0
    return tmp_path / "job"


def kinds(directory: Path) -> list[str]:
    return sorted(problem.kind for problem in verify(directory).problems)


def damage(directory: Path) -> list[str]:
    """Everything that verify knows, once."""
    images, manifest = directory / "images", directory / "manifest.jsonl"
    rows = read_rows(manifest)
    (images / "p0.png").unlink()
    (images / "p1.png").write_bytes(b"not the same")
    Image.new("RGB", (32, 32)).save(images / "p2.png")
    (images / "p3.png").write_bytes(b"no picture")
    (images / ".p4.png.tmp").write_bytes(b"half")
    (images / "extra.png").write_bytes((images / "p5.png").read_bytes())
    by_id = {row["id"]: row for row in rows}
    by_id["p2"]["sha256"] = _sha256(images / "p2.png")
    by_id["p3"]["sha256"] = _sha256(images / "p3.png")
    lines = [json_line(row) for row in by_id.values()]
    broken = [b'{"id": "p6"}\n', b"[1, 2]\n", json_line(by_id["p7"]), b'{"id": "p8", "torn']
    manifest.write_bytes(b"".join(lines + broken))
    pictures = ["altered_image", "missing_image", "orphan", "temporary", "undecodable_image", "wrong_size"]
    return sorted([*pictures, "bad_row", "bad_row", "duplicate_row", "torn_line"])


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_sound_job_has_no_problems(finished: Path) -> None:
    verdict = verify(finished)
    assert verdict.problems == []
    assert verdict.images == harness.ROWS


def test_every_kind_of_damage_is_found(finished: Path) -> None:
    expected = damage(finished)
    assert kinds(finished) == expected


def test_looking_changes_nothing(finished: Path) -> None:
    damage(finished)
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    verify(finished)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_what_repair_leaves_is_sound_and_the_next_run_completes_it(finished: Path) -> None:
    undisturbed = harness.essence(finished)
    damage(finished)
    with alone(finished):
        repair(verify(finished))
    assert kinds(finished) == []
    assert harness.run(finished.parent / "rows.jsonl", finished) == 0
    assert harness.essence(finished) == undisturbed
    assert kinds(finished) == []


def test_a_running_job_is_not_repaired(finished: Path) -> None:
    lock = Lock(finished)
    try:
        with pytest.raises(JobError, match="in use by pid"), alone(finished):
            pytest.fail("while a job runs")
    finally:
        lock.release()


def test_no_job_runs_between_look_and_repair(finished: Path, fluxcli) -> None:
    """A row committed while the user thinks would not be among those to keep."""
    expected = damage(finished)
    with alone(finished):
        with pytest.raises(JobError, match="in use by pid"):
            Lock(finished)
        refused = fluxcli("verify", finished, "--repair", "--yes")
        assert refused.returncode == 1 and "in use by pid" in refused.stderr
        assert fluxcli("verify", finished).returncode == 1  # to look is allowed
    assert kinds(finished) == expected


def test_a_directory_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"there is no job\.json"):
        verify(tmp_path)


def test_the_command_tells_exits_and_repairs(finished: Path, fluxcli) -> None:
    assert fluxcli("verify", finished).returncode == 0
    damage(finished)
    found = fluxcli("verify", finished, "--json")
    assert found.returncode == 1
    assert found.json["ok"] is False and found.json["counts"]["bad_row"] == 2
    assert "missing_image: images/p0.png" in found.stderr
    asked = fluxcli("verify", finished, "--repair", stdin=b"n\n")
    assert "Remove all of these?" in asked.stderr
    assert (finished / "images" / "extra.png").exists()
    assert fluxcli("verify", finished, "--repair", "--yes").returncode == 1
    assert fluxcli("verify", finished).returncode == 0
    assert json.loads((finished / "job.json").read_text())["model"]["name"] == "tiny"
