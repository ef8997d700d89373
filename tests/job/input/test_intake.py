"""One pass over the input: what is done, what moved, what changed meanwhile, what is asked for and not done."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fluxcli.core.config import RowDefaults
from fluxcli.core.errors import InputError
from fluxcli.core.files import folds_case
from fluxcli.core.records import PromptRecord
from fluxcli.job.input.check import check_row, derived_seed
from fluxcli.job.input.intake import Intake, OneRow, take_in
from fluxcli.job.output.committed import committed_status, read_committed, record_settings
from tests.job import harness
from tests.job.input.conftest import DEFAULTS, LENGTHS, images, take

SCHNELL = RowDefaults(1024, 1024, 4, None)


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def commit(directory: Path, records: Iterable[PromptRecord]) -> Path:
    """A manifest in which these images are made."""
    directory.mkdir(exist_ok=True)
    rest = {"sha256": "0" * 64, "run": 0, "finished_at": "2026-01-01T00:00:00.000Z"}
    rows = ({"id": each.id, "file_name": f"images/{each.id}.png", **record_settings(each), **rest} for each in records)
    return write(directory / "manifest.jsonl", rows)


def again(path: Path, directory: Path, **more: Any) -> Intake:
    """The intake of a later start."""
    manifest = directory / "manifest.jsonl"

    def committed() -> Iterable[tuple[str, str]]:
        return ((row["id"], row["prompt"]) for row in map(json.loads, manifest.read_text().splitlines()))

    return take(path, status=committed_status(read_committed(directory)), committed=committed, **more)


# Rows that are done


def test_done_rows_are_counted_and_never_tokenized(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": f"row {n}", "n": 2} for n in range(5)])
    commit(tmp_path / "out", images(take(path)))
    write(path, [*path.read_text().splitlines(), {"prompt": "new"}])
    status = committed_status(read_committed(tmp_path / "out"))
    counted: list[str] = []

    def count(prompts: list[str]) -> list[int]:
        counted.extend(prompts)
        return [1] * len(prompts)

    intake = take_in(take(path).source, DEFAULTS, LENGTHS, count, status)
    assert (intake.done, [record.prompt for record in images(intake)], counted) == (10, ["new"], ["new"])


def test_images_made_when_derived_seeds_had_63_bits_are_done(tmp_path: Path) -> None:
    from dataclasses import replace

    path = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "n": 2}, {"prompt": "c", "seed": 5}])
    made = [
        record if record.id == "000002" else replace(record, seed=derived_seed(0, record.id, bits=63))
        for record in images(take(path))
    ]
    assert made[0].seed >= 2**53
    commit(tmp_path / "out", made)
    write(path, [*path.read_text().splitlines(), {"prompt": "new"}])
    intake = again(path, tmp_path / "out")
    assert (intake.done, [record.id for record in images(intake)], intake.failures) == (4, ["000003"], [])


def test_drop_leaves_out_by_id_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": "a", "id": "x"}, {"id": "y"}, {"prompt": "z" * 600}, "bad"])
    intake = take(path)
    asked: list[Any] = []
    dropped = intake.drop(lambda id, line: asked.append((id, line)) or id in ("000002", "y"))  # type: ignore[func-returns-value]
    assert asked == [("x", 1), ("000002", 3), ("y", 2), (None, 4)]
    assert (dropped, intake.skipped, intake.truncated) == (2, 2, 0)
    assert [record.id for record in images(intake)] == ["x"]
    assert [failure.line for failure in intake.failures] == [4]


# Rows without ids that have moved


COLOURS = ["a red circle", "a blue square", "a green star", "a green circle"]
MOVES: dict[str, Callable[[list[str]], list[str]]] = {
    "added above": lambda rows: ["a yellow star", *rows],
    "many added above": lambda rows: [f"new {n}" for n in range(50)] + rows,
    "added amid": lambda rows: [*rows[:2], "new", *rows[2:]],
    "the first removed": lambda rows: rows[1:],
    "turned around": lambda rows: rows[::-1],
    "two changed places": lambda rows: [rows[1], rows[0], *rows[2:]],
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("copies", [1, 2])
def test_rows_without_ids_that_moved_are_noticed_before_anything_is_made_twice(
    tmp_path, move: str, copies: int
) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": prompt, "n": copies} for prompt in COLOURS])
    commit(tmp_path / "out", images(take(path)))
    write(path, [{"prompt": prompt, "n": copies} for prompt in MOVES[move](COLOURS)])
    with pytest.raises(InputError, match=r"rows without ids have moved: line \d+ was made as 0000\d\d") as stop:
        again(path, tmp_path / "out")
    assert "--id-column" in str(stop.value)
    assert len(str(stop.value).splitlines()) == 2


@pytest.mark.parametrize("added", [1, 1500])
def test_thousands_of_rows_that_moved_are_noticed_early_or_at_the_end(tmp_path: Path, added: int) -> None:
    path = write(tmp_path / "in.txt", [f"row {n}" for n in range(2000)])
    commit(tmp_path / "out", images(take(path)))
    write(path, [f"new {n}" for n in range(added)] + [f"row {n}" for n in range(2000)])
    reads = 0

    def committed() -> Iterable[tuple[str, str]]:
        nonlocal reads
        reads += 1
        return ((f"{n:06d}", f"row {n}") for n in range(2000))

    with pytest.raises(InputError, match="rows without ids have moved"):
        take(path, status=committed_status(read_committed(tmp_path / "out")), committed=committed)
    assert reads == (1 if added == 1 else 2)


@pytest.mark.parametrize(
    "changed",
    [
        ["a red circle", "CHANGED", "a green star", "a green circle"],
        ["a red circle", "a red circle", "a green star", "a green circle"],
        ["x", "y", "z", "w"],
        ["a red circle", "a blue square", "a green star", "a green circle", "a red circle"],
    ],
)
def test_rows_that_changed_or_came_after_have_not_moved(tmp_path: Path, changed: list[str]) -> None:
    path = write(tmp_path / "in.txt", COLOURS)
    commit(tmp_path / "out", images(take(path)))
    intake = again(write(path, changed), tmp_path / "out")
    wrong = [n + 1 for n, (before, now) in enumerate(zip(COLOURS, changed, strict=False)) if before != now]
    assert [failure.line for failure in intake.failures] == wrong
    assert {failure.kind for failure in intake.failures} <= {"changed_row"}
    assert len(images(intake)) == len(changed) - 4


def test_rows_with_ids_may_move_and_change_as_they_like(tmp_path: Path) -> None:
    rows = [{"id": f"x{n}", "prompt": prompt} for n, prompt in enumerate(COLOURS)]
    path = write(tmp_path / "in.jsonl", rows)
    commit(tmp_path / "out", images(take(path)))
    assert again(write(path, [{"id": "new", "prompt": "n"}, *rows[::-1]]), tmp_path / "out").done == 4
    swapped = [{**row, "prompt": prompt} for row, prompt in zip(rows, COLOURS[::-1], strict=True)]
    intake = again(write(path, swapped), tmp_path / "out")
    assert [failure.kind for failure in intake.failures] == ["changed_row"] * 4


def test_the_manifest_is_read_again_only_where_a_row_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "in.txt", COLOURS)
    commit(tmp_path / "out", images(take(path)))

    def never() -> Iterable[tuple[str, str]]:
        raise AssertionError
        yield

    take(write(path, [*COLOURS, "new"]), status=committed_status(read_committed(tmp_path / "out")), committed=never)


# The input changes while the job runs


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "turned around": lambda data: b"".join(data.splitlines(True)[::-1]),
    "other prompts": lambda data: data.replace(b"picture", b"paintin"),
    "cut short": lambda data: data[: len(data) // 8],
    "shifted": lambda data: b"x" + data,
    "bad rows": lambda data: data.replace(b'"id": "p', b'"id": "/').replace(b"p1", b"/1"),
    "emptied": lambda data: b"",
    "other settings": lambda data: data.replace(b"16", b"32"),
}


def written(path: Path) -> Path:
    rows = [{"id": f"p{n:02d}", "prompt": f"picture {n:02d} and more", "tag": 16} for n in range(40)]
    if path.suffix == ".csv":
        path.write_text("id,prompt,tag\n" + "".join(f"{row['id']},{row['prompt']},{row['tag']}\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
@pytest.mark.parametrize("edit", EDITS)
def test_a_row_that_changed_meanwhile_is_never_drawn(tmp_path: Path, suffix: str, edit: str) -> None:
    path = written(tmp_path / f"in{suffix}")
    intake = take(path)
    before = images(intake)
    with path.open("r+b") as file:
        data = EDITS[edit](file.read())
        file.seek(0)
        file.truncate()
        file.write(data)
    changed = 0
    for image in range(40):
        try:
            assert intake.records([image]) == [before[image]]
        except InputError as error:
            assert "changed while the job was reading it" in str(error)
            assert "run again" in str(error)
            changed += 1
    assert changed >= 10


def test_an_input_replaced_by_rename_is_read_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl")
    intake = take(path)
    (tmp_path / "new").write_text("other\n")
    os.replace(tmp_path / "new", path)
    assert len(images(intake)) == 40


@pytest.mark.parametrize("edit", ["turned around", "other prompts", "cut short"])
def test_a_job_whose_input_is_rewritten_stops_and_a_later_start_makes_each_image_once(
    tmp_path: Path, edit: str
) -> None:
    path = written(tmp_path / "in.jsonl")
    good = path.read_bytes()

    def broken(batch: Any, pixels: Any, finite: Any) -> None:
        if batch.index == 1:
            path.write_bytes(EDITS[edit](good))

    with pytest.raises(InputError, match=r"in\.jsonl: changed while the job was reading it"):
        harness.run(path, tmp_path / "out", harness.SeedEngine(broken))
    path.write_bytes(good)
    assert harness.run(path, tmp_path / "out") == 0
    rows = harness.manifest(tmp_path / "out")
    assert {row["id"]: row["prompt"] for row in rows} == {f"p{n:02d}": f"picture {n:02d} and more" for n in range(40)}
    assert len(rows) == 40


# Names that differ by case


def test_where_case_is_folded_ids_that_differ_by_it_are_refused_naming_both(tmp_path: Path) -> None:
    ids = ["A", "b", "a", "B-1", "x"]
    path = write(
        tmp_path / "in.jsonl", [{"id": id, "prompt": "p"} for id in ids] + [{"id": "b", "prompt": "p", "n": 2}]
    )
    assert len(images(take(path))) == 7
    intake = take(path, folds_case=True)
    assert [record.id for record in images(intake)] == ["A", "b", "B-1", "x"]
    assert [(failure.id, failure.line) for failure in intake.failures] == [("a", 3), ("b-1", 6)]
    assert "id a and the earlier A" in intake.failures[0].message
    assert "id b-1 and the earlier B-1" in intake.failures[1].message


def test_folding_is_told_by_a_name_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "Out"
    assert folds_case(out / "not" / "yet") is False
    (out / "images").mkdir(parents=True)
    assert folds_case(out) is False
    (out / "IMAGES").mkdir()
    assert folds_case(out) is False, "another directory, not another name of this one"
    (out / "IMAGES").rmdir()
    (out / "IMAGES").symlink_to("images")  # as a file system that folds case shows it
    assert folds_case(out) is True
    assert sorted(os.listdir(out)) == ["IMAGES", "images"]


# What is asked for and not done


def asked(tmp_path: Path, rows: list[Any], name: str = "in.jsonl", **more: Any) -> dict[str, int]:
    return dict(take(write(tmp_path / name, rows), **more).tally.asked())


LOOKALIKES = """trueCfgScale prompt_2 loras sampler scheduler cfg_scale CFG cfg image strength num_steps w h
sigmas height_px max_sequence_length numInferenceSteps guidance-scale clip_skip random_seed ip_adapter_image"""


@pytest.mark.parametrize("key", LOOKALIKES.split())
def test_a_key_that_looks_like_a_setting_and_is_none_is_counted(tmp_path: Path, key: str) -> None:
    rows = [{"prompt": "a", key: 4}, {"prompt": "b", key: 4}, {"prompt": "c"}]
    assert asked(tmp_path, rows) == {key: 2}
    assert asked(tmp_path, [f"prompt\t{key}", "a\t4", "b\t "], "in.tsv") == {key: 1}
    assert asked(tmp_path, [{"body": {"prompt": "a", key: 4}}]) == {f"body.{key}": 1}


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, False, 0, "nan", "None"])
def test_a_foreign_setting_without_a_value_asks_for_nothing(tmp_path: Path, nothing: Any) -> None:
    assert asked(tmp_path, [{"prompt": "a", "loras": nothing, "sampler": nothing}]) == {}


def test_a_true_cfg_scale_of_one_asks_for_nothing(tmp_path: Path) -> None:
    assert asked(tmp_path, [{"prompt": "a", "true_cfg_scale": scale} for scale in (1, 1.0, 0, None)]) == {}
    assert asked(tmp_path, [{"prompt": "a", "trueCfgScale": scale} for scale in (1, 1.0, "1.0", None)]) == {}


def test_a_true_cfg_scale_without_a_negative_prompt_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "true_cfg_scale": 4}, {"prompt": "b", "true_cfg_scale": 4, "negative_prompt": ""}]
    assert asked(tmp_path, rows) == {"true_cfg_scale (no negative_prompt)": 1}


def test_the_bucket_holds_the_negative_prompt_too(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "true_cfg_scale": 4, "negative_prompt": text} for text in ("", "b " * 30, "b " * 600)]
    rows += [{"prompt": "a " * 40, "true_cfg_scale": 4, "negative_prompt": ""}, {"prompt": "a"}]
    intake = take(write(tmp_path / "in.jsonl", rows))
    records = intake.records(range(5))
    assert [record.text_tokens for record in records] == [
        len(text) for text in ("a", "b " * 30, "b " * 600, "a " * 40, "a")
    ]
    assert [group.branches for group in intake.groups] == [2, 2, 2, 2, 1]
    assert [record.group for record in records] == intake.groups
    assert records[2].truncated and not records[1].truncated


@pytest.mark.parametrize("key", ["tag", "model", "url", "category", "include", "Note", "step"])
def test_any_other_key_is_counted_as_unknown_alone(tmp_path: Path, key: str) -> None:
    intake = take(write(tmp_path / "in.jsonl", [{"prompt": "a", key: ""}, {"prompt": "b", key: ""}, {"prompt": "c"}]))
    assert dict(intake.tally.asked()) == {}
    assert dict(intake.tally.unknown()) == {key: 2}


def test_guidance_of_rows_is_told_where_the_model_takes_none(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "guidance": 4}, {"prompt": "b", "guidance_scale": None}, {"prompt": "c"}]
    assert asked(tmp_path, rows) == {}
    assert asked(tmp_path, rows, defaults=SCHNELL) == {"guidance (this model takes none)": 1}


def test_options_in_the_text_and_lora_tags_are_told(tmp_path: Path) -> None:
    rows = [
        '--prompt "a red circle" --negative_prompt "blurry" --seed 350 --steps 2',
        "a blue square --width 64 --height 64",
        "a sign that says --help me-- seed",
        "a cube <lora:style:0.8>",
    ]
    told = {"options like --seed in the text": 2, "<lora:...> in the prompt": 1}
    assert asked(tmp_path, rows, "in.txt") == told
    assert asked(tmp_path, [{"prompt": row} for row in rows]) == {"<lora:...> in the prompt": 1}


def test_keys_of_a_hostile_file_are_counted_in_bounded_memory(tmp_path: Path) -> None:
    rows = [{"prompt": "a", **{f"cfg{' ' * n}": 1, f"{n}" * 3000: 1}} for n in range(1500)]
    tally = take(write(tmp_path / "in.jsonl", rows)).tally
    for counts in (tally.asked(), tally.unknown()):
        assert len(counts) <= 1001
        assert all(len(name) <= 64 for name in counts)
    assert tally.asked().total() == 1500
    assert tally.unknown().total() == 3000


def test_one_row_is_taken_in_as_a_file_of_it_is(tmp_path: Path) -> None:
    row = {"prompt": "a", "seed": 3, "num_images": 3}
    path = write(tmp_path / "in.jsonl", [row])
    alone = take_in(OneRow(row), DEFAULTS, LENGTHS, lambda prompts: [1] * len(prompts))
    assert images(alone) == images(take(path))


@pytest.mark.parametrize("seed", [0, 2**53, 2**63, 2**64 - 1])
def test_every_seed_of_the_table_is_one_that_torch_takes(seed: int) -> None:
    torch = pytest.importorskip("torch")
    from fluxcli.engine.denoise import latent_noise

    (record,) = check_row({"prompt": "a", "seed": seed}, 0, 1, DEFAULTS)
    noise = latent_noise(record.seed, 16, 8, 8, torch.float32)
    generator = torch.Generator("cpu").manual_seed(seed)
    assert torch.equal(noise, torch.randn((1, 16, 8, 8), generator=generator)[0])
