"""fluxcli from Python: the same images, the same jobs, errors that are caught by one name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fluxcli
from tests.conftest import read_rows, write_rows

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
