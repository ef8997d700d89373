"""fluxcli from Python: the same images, the same jobs, errors that are caught by one name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fluxcli
from tests.conftest import read_rows, write_rows
from tests.pipelines import DEV
from tests.single_files import all_in_one

SMALL = {"width": 64, "height": 64, "steps": 1}
OPTIONS = ("-m", "tiny", "--width", 64, "--height", 64, "--steps", 1)


@pytest.fixture(scope="module")
def tiny() -> Iterator[fluxcli.Model]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fluxcli.load("tiny", device="cpu")
    torch.set_num_threads(threads)


def test_generate_makes_what_gen_writes(tiny: fluxcli.Model, command: Any, tmp_path: Path) -> None:
    made = tiny.generate("a red circle", seed=5, n=3, batch_size=2, **SMALL)
    assert [(type(image).__name__, image.mode, image.size) for image in made] == [("Image", "RGB", (64, 64))] * 3
    result = command("gen", "a red circle", "--seed", 5, "-n", 3, "--batch-size", 2, *OPTIONS, cwd=tmp_path)
    for image, name in zip(made, result.stdout.split(), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / name)))
    assert tiny.name == "tiny"


def test_a_models_own_settings_are_the_default(tiny: fluxcli.Model) -> None:
    (image,) = tiny.generate("a", steps=1)
    assert image.size == (128, 128)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"width": 100}, "width"),
        ({"height": 8192}, "height"),
        ({"steps": 0}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"n": 0}, "num_images"),
        ({"batch_size": 0}, "batch_size"),
        ({"prompt": " "}, "prompt"),
    ],
)
def test_an_argument_that_cannot_be_meant_is_an_error_that_names_it(
    tiny: fluxcli.Model, given: dict[str, Any], names: str
) -> None:
    with pytest.raises(fluxcli.FluxcliError, match=names):
        tiny.generate(**{"prompt": "a", **given})


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"model": "./nothere"}, "nothere"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"attention": "none"}, "attention"),
        ({"text_lengths": (64, 1024)}, "text_lengths"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_an_error(given: dict[str, Any], names: str) -> None:
    with pytest.raises(fluxcli.FluxcliError, match=names):
        fluxcli.load(**{"model": "tiny", **given})


def test_a_job_runs_resumes_and_tells_what_it_did(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}])
    job = fluxcli.Job(tmp_path / "in.jsonl", tmp_path / "out", "tiny", device="cpu", format="jpg", **SMALL)
    said: list[str] = []
    totals = job.run(said.append)
    assert (totals["images"], totals["failures"], totals["exit_status"]) == (2, 1, 3)
    assert totals["directory"] == str(tmp_path / "out")
    assert [line for line in said if not line.startswith("tiny ")] == ["line 2: prompt is empty"]
    assert [row["id"] for row in read_rows(tmp_path / "out" / "manifest.jsonl")] == ["000000", "000002"]
    again = job.run()
    assert (again["images"], again["done_before"]) == (0, 2)
    other = fluxcli.Job(tmp_path / "in.jsonl", tmp_path / "out", "tiny", device="cpu", seed=1, format="jpg", **SMALL)
    with pytest.raises(fluxcli.FluxcliError, match="--seed was 0, now 1"):
        other.run()


@pytest.mark.parametrize(
    "given",
    [
        *({"format": "gif"}, {"quality": 0}, {"batch_size": 0}, {"width": 100}, {"workers": 0}, {"workers": 1.5}),
        *({"gpus": 0}, {"gpus": []}, {"gpus": [1, 1]}, {"gpus": [-1]}, {"gpus": "some"}, {"gpus": True}),
        {"gpus": 1, "workers": 1},
    ],
)
def test_a_job_that_cannot_be_meant_makes_no_directory(tmp_path: Path, given: dict[str, Any]) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    with pytest.raises(fluxcli.FluxcliError, match=next(iter(given))):
        fluxcli.Job(tmp_path / "in.jsonl", tmp_path / "out", "tiny", **given).run()
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        fluxcli.nothing  # noqa: B018
    assert {"load", "Job", "Model", "FluxcliError"} <= set(dir(fluxcli))


def test_types_are_shipped() -> None:
    assert (Path(fluxcli.__file__).parent / "py.typed").is_file()


def test_adapters_are_a_rows_and_a_file_made_anew_is_read_anew(tiny: fluxcli.Model, command, tmp_path: Path) -> None:
    from tests.adapters import FORMATS, Maker
    from tests.pipelines import TINY

    path = FORMATS["kohya"](Maker(TINY, 1)).write(tmp_path / "style.safetensors")
    given = {"prompt": "a red circle", "seed": 5, **SMALL}
    (plain,), (first,) = tiny.generate(**given), tiny.generate(**given, lora=path)
    half = [{"path": str(path), "scale": 0.5}]
    (halved,) = tiny.generate(**given, lora=half)
    assert len({np.asarray(image).tobytes() for image in (plain, first, halved)}) == 3
    result = command("gen", "a red circle", "--seed", 5, "--lora", f"{path}=0.5", *OPTIONS, cwd=tmp_path)
    assert np.array_equal(np.asarray(halved), np.asarray(Image.open(tmp_path / result.stdout.strip())))
    FORMATS["kohya"](Maker(TINY, 2)).write(path)
    (second,) = tiny.generate(**given, lora=path)
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    assert np.array_equal(np.asarray(plain), np.asarray(tiny.generate(**given)[0]))
    with pytest.raises(fluxcli.FluxcliError, match=r"gone\.safetensors: no such file"):
        tiny.generate(**given, lora=[tmp_path / "gone.safetensors"])
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a red circle", "seed": 5, "id": "one"}])
    job = fluxcli.Job(tmp_path / "in.jsonl", tmp_path / "out", model="tiny", device="cpu", lora=half, **SMALL)
    assert job.run()["exit_status"] == 0
    (row,) = read_rows(tmp_path / "out" / "manifest.jsonl")
    assert (row["lora"][0]["scale"], row["lora"][0]["path"]) == (0.5, str(path))


def test_true_cfg_from_python(tmp_path: Path) -> None:
    model = fluxcli.load("tiny", device="cpu")
    words = {"width": 64, "height": 64, "steps": 2, "seed": 3}
    plain, off, guided = (
        model.generate("a red circle", **words, **more)[0].tobytes()
        for more in ({}, {"negative_prompt": ""}, {"negative_prompt": "", "true_cfg_scale": 4})
    )
    assert plain == off != guided
    with pytest.raises(fluxcli.FluxcliError, match="negative_prompt needs true_cfg_scale above 1"):
        model.generate("x", negative_prompt="ugly")
    with pytest.raises(fluxcli.FluxcliError, match="true_cfg_scale must be a number"):
        model.generate("x", true_cfg_scale="4")  # type: ignore[arg-type]
    (tmp_path / "in.jsonl").write_text('{"prompt": "a red circle", "seed": 3}\n')
    settings = {"device": "cpu", "width": 64, "height": 64, "steps": 2, "negative_prompt": "", "true_cfg_scale": 4}
    totals = fluxcli.Job(tmp_path / "in.jsonl", tmp_path / "out", "tiny", **settings).run()
    assert totals["exit_status"] == 0
    with Image.open(tmp_path / "out" / "images" / "000000.png") as made:
        assert made.tobytes() == guided


def test_single_files_from_python(pipeline, tmp_path: Path) -> None:
    model = pipeline(DEV)
    whole = all_in_one(model, tmp_path / "whole.safetensors")
    words = {"width": 64, "height": 64, "steps": 2}
    made = [
        fluxcli.load(model, device="cpu", files=files).generate("x", **words)[0].tobytes()
        for files in (None, {"transformer": whole, "vae": whole})
    ]
    assert made[0] == made[1]
    with pytest.raises(fluxcli.FluxcliError, match=r"files must be one of .*, got 'tokenizer'"):
        fluxcli.load(model, files={"tokenizer": whole})
