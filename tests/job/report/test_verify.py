"""`fluxcli verify` finds whatever is not as the manifest says, and --repair leaves just what the next run completes."""

import json
import os
import shutil
import stat
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from fluxcli.core.errors import JobError
from fluxcli.core.files import json_line
from fluxcli.job.output.lock import Lock
from fluxcli.job.report.repair import alone, repair
from fluxcli.job.report.verify import verify
from tests.conftest import read_rows
from tests.job import harness


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


def hand_over(directory: Path, home: Path) -> dict[Path, bytes]:
    """Makes a job's directory one that a stranger laid traps in; what must stay as it is."""
    home.mkdir()
    for name in ("thesis.txt", "rc", ".a.png.tmp", "p0.png"):
        (home / name).write_bytes(b"precious")
    rows = read_rows(directory / "manifest.jsonl")
    traps = ["images/../../home/thesis.txt", str(home / "rc"), "images/0001/../../home/rc", "/dev/zero"]
    lines = [json_line({**rows[0], "id": f"z{n}", "file_name": name}) for n, name in enumerate(traps)]
    with (directory / "manifest.jsonl").open("ab") as manifest:
        manifest.writelines(lines)
    (directory / "images" / "elsewhere").symlink_to(home)
    (directory / "images" / "0001").symlink_to(home)
    (directory / "images" / "p0.png").unlink()
    (directory / "images" / "p0.png").symlink_to(home / "p0.png")
    (directory / ".lock").symlink_to(home / "rc")
    return {path: path.read_bytes() for path in home.iterdir()}


def test_a_directory_from_somebody_else_harms_nothing_outside_it(finished: Path, tmp_path: Path) -> None:
    undisturbed = harness.essence(finished)
    before = hand_over(finished, tmp_path / "home")
    with pytest.raises(JobError, match=r"\.lock: is a link"):
        harness.run(tmp_path / "rows.jsonl", finished)
    assert "bad_lock" in kinds(finished)
    with alone(finished):
        verdict = verify(finished)
        assert repair(verdict) == []
    assert {path: path.read_bytes() for path in (tmp_path / "home").iterdir()} == before
    assert kinds(finished) == []
    assert harness.run(tmp_path / "rows.jsonl", finished) == 0
    assert harness.essence(finished) == undisturbed
    assert {path: path.read_bytes() for path in (tmp_path / "home").iterdir()} == before


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def full_directory(path: Path) -> None:
    path.mkdir()
    (path / "x").touch()


ODD = {
    "pipe": fifo,
    "socket": a_socket,
    "dangling": lambda path: path.symlink_to("/nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "of the directory": lambda path: path.symlink_to("."),
    "empty directory": Path.mkdir,
    "full directory": full_directory,
}


@pytest.mark.parametrize("name", ["p3.png", "extra.png", "anything"])
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_file_is_found_cured_and_never_waited_for(finished: Path, name: str, odd: str) -> None:
    undisturbed = harness.essence(finished)
    path = finished / "images" / name
    path.unlink(missing_ok=True)
    ODD[odd](path)
    expected = ["not_a_file"] if name != "p3.png" else ["missing_image", "not_a_file"]
    assert kinds(finished) == expected
    rows = finished.parent / "rows.jsonl"
    if name == "anything" or "directory" not in odd or odd == "of the directory":
        assert harness.run(rows, finished) == 0, "a job goes on beside it"
    else:
        with pytest.raises(JobError, match=rf"{name}: is a directory in an image's place"):
            harness.run(rows, finished)
    with alone(finished):
        left = repair(verify(finished))
    assert os.path.lexists(path) == (odd == "full directory" or (name == "p3.png" and path.is_file()))
    assert bool(left) == (odd == "full directory")
    if odd != "full directory":
        assert harness.run(rows, finished) == 0
        assert harness.essence(finished) == undisturbed
        assert kinds(finished) == []


@pytest.mark.parametrize("name", ["manifest.jsonl", "failures.jsonl", "runs.jsonl", "job.json", ".lock"])
@pytest.mark.parametrize("odd", ["pipe", "socket", "dangling", "empty directory"])
def test_a_file_of_the_job_that_is_none(finished: Path, name: str, odd: str) -> None:
    (finished / name).unlink(missing_ok=True)
    ODD[odd](finished / name)
    found = kinds(finished)
    assert found == [{"job.json": "bad_job", ".lock": "bad_lock"}.get(name, "not_a_file")]
    with pytest.raises(JobError, match=rf"{name}: is a"):
        harness.run(finished.parent / "rows.jsonl", finished)
    with alone(finished):
        left = repair(verify(finished))
    assert (len(left), os.path.lexists(finished / name)) == ((1, True) if name == "job.json" else (0, False))
    assert len(list((finished / "images").iterdir())) == harness.ROWS, "images are not strays for want of a manifest"


def test_a_foreign_file_among_the_images_is_told_and_left(finished: Path) -> None:
    (finished / "images" / "notes.txt").write_text("mine")
    assert kinds(finished) == ["orphan"]
    with alone(finished):
        assert repair(verify(finished)) == ["images/notes.txt: no name that fluxcli gives; --repair leaves it alone"]
    assert (finished / "images" / "notes.txt").read_text() == "mine"


def test_an_optimised_image_is_told_and_kept_by_repair(finished: Path) -> None:
    path = finished / "images" / "p4.png"
    with Image.open(path) as image:
        image.save(path, "PNG", compress_level=9)
    optimised = path.read_bytes()
    (problem,) = verify(finished).problems
    assert (problem.kind, problem.id) == ("altered_image", "p4") and "--repair keeps it" in problem.detail
    rows = finished.parent / "rows.jsonl"
    with pytest.raises(JobError, match=r"images/p4\.png: changed since"):
        harness.run(rows, finished)
    with alone(finished):
        repair(verify(finished))
    assert kinds(finished) == []
    engine = harness.SeedEngine()
    assert harness.run(rows, finished, engine) == 0
    assert engine.batches == [] and path.read_bytes() == optimised


def test_a_manifest_that_went_through_pandas_is_put_right(finished: Path) -> None:
    """read_json and to_json(lines=True): ids of digits become numbers, times milliseconds, gaps null."""
    rows = finished.parent / "numbered.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"picture {i}"}) + "\n" for i in range(5)))
    directory = finished.parent / "numbered"
    assert harness.run(rows, directory) == 0
    undisturbed = harness.essence(directory)
    manifest = directory / "manifest.jsonl"

    def pandas(row: dict) -> dict:
        at = datetime.fromisoformat(row["finished_at"])
        return {**row, "id": int(row["id"]), "finished_at": int(at.timestamp() * 1000), "width": 64.0, "timing": None}

    manifest.write_text("".join(json.dumps(pandas(row)) + "\n" for row in read_rows(manifest)))
    with pytest.raises(JobError, match=r"manifest\.jsonl, line 1: id must be an id .*, not 1;|not \d;"):
        harness.run(rows, directory)
    verdict = verify(directory)
    assert [problem.kind for problem in verdict.problems] == ["bad_row"] * 5 and verdict.images == 5
    assert all("--repair puts it right" in problem.detail for problem in verdict.problems)
    with alone(directory):
        repair(verify(directory))
    assert kinds(directory) == []
    engine = harness.SeedEngine()
    assert harness.run(rows, directory, engine) == 0 and engine.batches == []
    assert {id: {**row, "timing": 0} for id, row in harness.essence(directory).items()} == {
        id: {**row, "timing": 0} for id, row in undisturbed.items()
    }


LINES = [b"[1]", b'"x"', b"null", b"\xff", b"[" * 10**5, b'{"run": "0"}', b'{"run": 1e400}', b'{"id": []}', b"\0" * 9]


@pytest.mark.parametrize("name", ["manifest.jsonl", "failures.jsonl", "runs.jsonl"])
def test_foreign_lines_are_found_and_moved_out_of_the_way(finished: Path, name: str) -> None:
    undisturbed = harness.essence(finished)
    path = finished / name
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(b"\n".join(LINES) + b"\n" + before)
    verdict = verify(finished)
    assert [problem.kind for problem in verdict.problems] == ["bad_row"] * len(LINES)
    assert [problem.detail.split()[1] for problem in verdict.problems] == [str(n + 1) for n in range(len(LINES))]
    assert verdict.as_lines().replace("\n", "").isprintable()
    with alone(finished):
        assert repair(verify(finished)) == []
    assert path.read_bytes() == before
    assert (finished / f"{name}.removed").read_bytes() == b"\n".join(LINES) + b"\n"
    assert kinds(finished) == []
    assert harness.run(finished.parent / "rows.jsonl", finished) == 0
    assert harness.essence(finished) == undisturbed


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "[" * 10**5, '{"model": 1}', '{"model": {}, "options": {}}', "\x1b]0;owned\x07", "x" * 2**21],
    ids=range(8),
)
def test_a_job_json_that_is_none_is_found_and_told_to_be_past_mending(finished: Path, text: str) -> None:
    (finished / "job.json").write_text(text)
    with pytest.raises(JobError, match=r"job\.json: is not a fluxcli job file") as error:
        harness.run(finished.parent / "rows.jsonl", finished)
    assert str(error.value).isprintable()
    with alone(finished):
        verdict = verify(finished)
        assert [problem.kind for problem in verdict.problems] == ["bad_job"]
        assert "cannot mend it" in "".join(repair(verdict))
    assert (finished / "job.json").read_text() == text


def test_leftovers_in_the_directory_are_seen_and_cleared(finished: Path) -> None:
    (finished / ".runs.jsonl.tmp").write_bytes(b"half")
    assert kinds(finished) == ["temporary"]
    with alone(finished):
        repair(verify(finished))
    assert kinds(finished) == []


def test_of_rows_of_one_id_the_first_good_one_stays(finished: Path) -> None:
    manifest = finished / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    gone = lines[0].replace(b"images/", b"images/0007/")
    manifest.write_bytes(gone + b"".join(lines) + lines[0])
    assert kinds(finished) == ["duplicate_row", "missing_image"]
    with alone(finished):
        repair(verify(finished))
    assert manifest.read_bytes() == b"".join(lines) and kinds(finished) == []


def test_a_name_that_is_no_text_is_shown_as_what_it_is(finished: Path, fluxcli) -> None:
    (finished / "images" / os.fsdecode(b"caf\xe9\x1b[31m.png")).touch()
    found = fluxcli("verify", finished, "--json")
    assert found.returncode == 1 and "\x1b" not in found.stderr and "Traceback" not in found.stderr
    assert found.json["problems"][0]["file_name"] == "images/caf\\xe9\x1b[31m.png"


def many(directory: Path, row: dict, count: int) -> Path:
    """A job of as many rows, its images links to one another, so that the disk holds few."""
    first = (directory.parent / "job" / row["file_name"]).read_bytes()
    directory.mkdir()
    shutil.copy(directory.parent / "job" / "job.json", directory)
    with (directory / "manifest.jsonl").open("wb") as manifest:
        for number in range(count):
            name = f"images/{1 + number // 10_000:04d}/r{number}.png"
            path = directory / name
            if number % 10_000 == 0:
                path.parent.mkdir(parents=True)
                source = path
                source.write_bytes(first)
            else:
                os.link(source, path)
            manifest.write(json_line({**row, "id": f"r{number}", "file_name": name}))
    return directory


@pytest.mark.slow
def test_a_row_more_costs_verify_a_few_bytes(tmp_path: Path) -> None:
    assert harness.run(harness.write_input(tmp_path / "rows.jsonl", 1), tmp_path / "job") == 0
    (row,) = read_rows(tmp_path / "job" / "manifest.jsonl")
    code = (
        "import sys; from pathlib import Path; from fluxcli.job.report.verify import verify\n"
        "found = verify(Path(sys.argv[1])); assert not found.problems, found.problems[:3]\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(found.images, peak.split()[1])"
    )

    def peak(count: int) -> int:
        """KiB."""
        command = [sys.executable, "-c", code, many(tmp_path / str(count), row, count)]
        images, kib = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(images) == count
        return int(kib)

    few, lots = peak(10_000), peak(150_000)
    each = (lots - few) * 1024 / 140_000
    print(f"{few} KiB for 10,000 rows, {lots} for 150,000: {each:.0f} bytes a row")
    assert each < 100 and lots < 150_000


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
    mended = fluxcli("verify", finished, "--repair", "--yes")
    assert mended.returncode == 0, mended.stderr
    assert fluxcli("verify", finished).returncode == 0
    lacking = fluxcli("verify", finished, "--complete", "--json")
    assert lacking.returncode == 1
    assert lacking.json["ok"] and lacking.json["missing"] == harness.ROWS - lacking.json["images"] > 0
    assert json.loads((finished / "job.json").read_text())["model"]["name"] == "tiny"
