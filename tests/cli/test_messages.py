"""Errors a user can cause: a line or two on stderr that name the file, line or option, an exit code, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.cli.conftest import SMALL, files
from tests.conftest import ENVIRONMENT, Result, write_rows
from tests.pipelines import DEV, build


def check_message(stderr: str, *names: str) -> None:
    lines = stderr.splitlines()
    assert 1 <= len(lines) <= 2, stderr
    assert "Traceback" not in stderr
    for name in names:
        assert name in stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with an input of one row, and files that are no inputs."""
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "notes.docx").write_bytes(b"x")
    (tmp_path / "no-prompt.csv").write_text("text\nx\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


TINY = ("-m", "tiny")
CASES: dict[str, tuple[tuple[Any, ...], int, tuple[str, ...]]] = {
    "no command of that name": (("paint",), 2, ("paint",)),
    "no option of that name": (("batch", "in.jsonl", "--stepps", 4), 2, ("--stepps",)),
    "no prompt": (("gen",), 2, ("PROMPT",)),
    "no input": (("batch",), 2, ("INPUT",)),
    "an input that is not there": (("batch", "nothere.jsonl", *TINY), 2, ("nothere.jsonl",)),
    "an input that is a directory": (("batch", "empty", *TINY), 2, ("empty",)),
    "an output that is a file": (("batch", "in.jsonl", "-o", "notes.docx", *TINY), 2, ("notes.docx",)),
    "an input of an unknown kind": (("batch", "notes.docx", *TINY), 1, ("notes.docx", ".jsonl")),
    "a table without prompts": (("batch", "no-prompt.csv", *TINY), 1, ("no-prompt.csv", "prompt")),
    "a width off the grid": (("batch", "in.jsonl", "--width", 100), 2, ("--width", "16")),
    "a height beyond the limit": (("gen", "a", "--height", 8192), 2, ("--height", "4096")),
    "no steps": (("gen", "a", "--steps", 0), 2, ("--steps",)),
    "an endless guidance": (("gen", "a", "--guidance", "nan"), 2, ("--guidance",)),
    "a seed below zero": (("gen", "a", "--seed", -1), 2, ("--seed",)),
    "a seed too large": (("gen", "a", "--seed", 2**64), 2, ("--seed",)),
    "seeds that count too far": (("gen", "a", *TINY, "--seed", 2**64 - 1, "-n", 2), 2, ("seed",)),
    "a text length beyond T5's": (("gen", "a", "--text-lengths", "64,1024"), 2, ("--text-lengths", "512")),
    "text lengths that are no numbers": (("gen", "a", "--text-lengths", "short"), 2, ("--text-lengths", "short")),
    "a dtype that is none": (("gen", "a", "--dtype", "int8"), 2, ("--dtype", "bfloat16")),
    "a device that is none": (("gen", "a", "--device", "tpu"), 2, ("--device", "tpu")),
    "a device that is not here": (("gen", "a", *TINY, "--device", "cuda"), 1, ("--device cuda",)),
    "an attention that cannot run": (("gen", "a", *TINY, "--attention", "cudnn"), 1, ("--attention cudnn",)),
    "a model that is nowhere": (("gen", "a", "-m", "./nothere"), 1, ("--model ./nothere",)),
    "a directory that is no model": (("gen", "a", "-m", "empty"), 1, ("--model empty", "model_index.json")),
    "a random model of no known kind": (
        ("gen", "a", "-m", "random:flux-pro"),
        1,
        ("random:flux-pro", "random:flux-dev"),
    ),
    "a revision of what has none": (("gen", "a", *TINY, "--revision", "main"), 1, ("--revision",)),
    "an output on a store": (("batch", "in.jsonl", "-o", "s3://bucket/out", *TINY), 2, ("s3://bucket/out", "-o")),
    "a picture on a store": (("gen", "a", "-o", "gs://bucket/a.png", *TINY), 2, ("gs://bucket/a.png",)),
    "an input on a store": (("batch", "s3://bucket/in.jsonl", *TINY), 2, ("s3://bucket/in.jsonl", "INPUT")),
    "settings on a store": (("batch", "in.jsonl", "--config", "https://a/b.toml"), 2, ("https://a/b.toml",)),
    "a job on a store": (("verify", "s3://bucket/out"), 2, ("s3://bucket/out",)),
    "an output below a file": (("batch", "in.jsonl", "-o", "in.jsonl/out", *SMALL), 1, ("in.jsonl",)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_users_error_is_a_line_or_two_and_an_exit_code(fluxcli: Callable[..., Result], home: Path, case: str) -> None:
    arguments, code, names = CASES[case]
    before = files(home)
    result = fluxcli(*arguments)
    assert result.returncode == code, result.stderr
    check_message(result.stderr, *names)
    assert result.stdout == ""
    assert files(home) == before


def test_verbose_shows_where_an_error_came_from(fluxcli: Callable[..., Result], home: Path) -> None:
    result = fluxcli("gen", "a", "-m", "empty", "-v")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "model_index.json" in result.stderr.splitlines()[-1]


def test_a_hub_model_that_is_not_cached_offline_is_one_line(fluxcli: Callable[..., Result], home: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hub")}
    result = fluxcli("gen", "a", "-m", "black-forest-labs/FLUX.1-dev", env=offline)
    assert result.returncode == 1
    check_message(result.stderr, "black-forest-labs/FLUX.1-dev", "HF_HUB_OFFLINE")
    assert len(result.stderr.splitlines()) == 1


def test_a_model_in_the_hubs_cache_works_offline(fluxcli: Callable[..., Result], pipeline, home: Path) -> None:
    repository = home / "hub" / "hub" / "models--someone--flux"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(pipeline(DEV), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hub")}
    result = fluxcli("batch", "in.jsonl", "-o", "out", *SMALL[2:], "-m", "someone/flux", env=offline)
    assert result.returncode == 0, result.stderr
    model = json.loads((home / "out" / "job.json").read_text())["model"]
    assert (model["name"], model["revision"]) == ("someone/flux", commit)


def test_a_reader_that_leaves_gets_no_traceback(home: Path) -> None:
    arguments = [sys.executable, "-m", "fluxcli", "gen", "a", *map(str, SMALL), "-n", "2"]
    environment = {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(
        arguments, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.returncode != 0
    assert list(home.glob("*.png"))
    assert b"Traceback" not in stderr
    assert b"BrokenPipeError" not in stderr


# Models whose files are not what they should be: in this process, which has torch loaded already.


@pytest.fixture
def model(pipeline, tmp_path: Path) -> Path:
    """A pipeline to harm."""
    shutil.copytree(pipeline(DEV), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def refusal(model: Path, tmp_path: Path, inside: Callable[..., Result]) -> Iterator[Callable[[], str]]:
    """What `gen` says of the harmed model."""

    def refusal() -> str:
        result = inside("gen", "a", "-m", model, *SMALL[2:])
        assert result.returncode == 1, result.stderr
        assert result.stdout == ""
        error = [line for line in result.stderr.splitlines() if not line.startswith("loading ")]
        check_message("\n".join(error))
        return error[0]

    yield refusal
    assert not list(tmp_path.glob("*.png"))


def harm(path: Path, how: str, name: str) -> None:
    tensors = load_file(path)
    if how == "missing":
        del tensors[name]
    elif how == "surplus":
        tensors[name] = tensors[next(iter(tensors))].clone()
    else:
        tensors[name] = tensors[name][1:].clone()
    save_file(tensors, path, metadata={"format": "pt"})


WEIGHTS = {
    "transformer": ("diffusion_pytorch_model", "single_transformer_blocks.1.attn.to_k.weight"),
    "vae": ("diffusion_pytorch_model", "decoder.conv_in.weight"),
    "text_encoder": ("model", "text_model.encoder.layers.1.mlp.fc1.weight"),
    "text_encoder_2": ("model", "encoder.block.1.layer.0.SelfAttention.k.weight"),
}


@pytest.mark.parametrize(
    ("part", "how"),
    [(part, how) for part in WEIGHTS for how in ("missing", "surplus", "misshapen")],
)
def test_a_tensor_out_of_place_is_an_error_that_names_it(model: Path, refusal, part: str, how: str) -> None:
    stem, name = WEIGHTS[part]
    path = model / part / f"{stem}.safetensors"
    known = next(key for key in load_file(path) if key.endswith(name.removeprefix("text_model.")))
    harm(path, how, "blocks.99.strange.weight" if how == "surplus" else known)
    message = refusal()
    assert str(model / part) in message
    assert how in message
    assert (
        "blocks.99.strange.weight" if how == "surplus" else name.rpartition(".")[0].removeprefix("text_model.")
    ) in message


def test_both_shapes_are_told_of_a_misshapen_tensor(model: Path, refusal) -> None:
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    harm(path, "misshapen", "x_embedder.weight")
    message = refusal()
    assert "x_embedder.weight" in message
    assert "[95, 64]" in message
    assert "[96, 64]" in message


def test_a_truncated_weight_file_is_named(model: Path, refusal) -> None:
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert path.name in refusal()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"])  # fmt: skip  # noqa: E501
def test_a_part_that_is_not_there_is_named(model: Path, refusal, part: str) -> None:
    shutil.rmtree(model / part)
    assert part in refusal()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("transformer/config.json", "{"),
        ("transformer/config.json", '{"attention_head_dim": 1, "what_is_this": 2}'),
        ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler"}'),
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline"}'),
        ("vae/config.json", "[]"),
    ],
)
def test_a_config_that_is_not_what_it_should_be_is_named(model: Path, refusal, file: str, text: str) -> None:
    (model / file).write_text(text)
    assert Path(file).parts[0] in refusal()


@pytest.fixture
def sharded(tmp_path: Path, model: Path) -> Path:
    """The pipeline to harm, its transformer in several files with an index."""
    shutil.rmtree(model)
    build(model, DEV, shard_size="200KB")
    return model / "transformer"


def test_a_shard_that_is_not_there_is_named(sharded: Path, refusal) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert shards[1].name in refusal()


def test_a_tensor_missing_from_its_shard_is_named(sharded: Path, refusal) -> None:
    index = json.loads((sharded / "diffusion_pytorch_model.safetensors.index.json").read_text())
    name, file = next((name, file) for name, file in index["weight_map"].items() if name.endswith("to_q.weight"))
    harm(sharded / file, "missing", name)
    assert name in refusal()


def test_a_sharded_model_makes_the_same_image(sharded: Path, pipeline, inside, tmp_path: Path) -> None:
    for number, model in enumerate((sharded.parent, pipeline(DEV))):
        result = inside("gen", "a", "-m", model, "-o", f"{number}.png", *SMALL[2:])
        assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "0.png").tobytes() == Image.open(tmp_path / "1.png").tobytes()


REMARKING = """
import sys, warnings
from fluxcli.cli.main import cli
from fluxcli.core.errors import Remark

@cli.command()
def remark():
    for _ in range(2):
        warnings.warn("a library's own remark")
        warnings.warn("quack is left out", Remark)

sys.argv[1:] = ["remark"]
cli()
"""


def test_a_remark_is_told_once_and_those_of_libraries_are_not() -> None:
    done = subprocess.run([sys.executable, "-c", REMARKING], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "Warning: quack is left out\n")


def test_quiet_leaves_results_and_errors_alone(inside, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a photo", "sed": 1}, {"prompt": "a", "width": 100}])
    done = inside("gen", "a photo", "-o", "a", *SMALL, "-q")
    assert (done.returncode, done.stderr) == (0, "") and Path(tmp_path, done.stdout.strip()).is_file()
    done = inside("batch", "in.jsonl", "-o", "out", *SMALL, "--quiet", "--json")
    assert (done.returncode, done.stderr) == (3, "") and done.json["images"] == done.json["failures"] == 1
    done = inside("batch", "nothere", "-q")
    assert done.returncode == 2 and "nothere" in done.stderr
    assert "loading" in inside("gen", "a", "-o", "b", *SMALL).stderr  # no longer quiet


def test_what_is_no_setting_is_told_before_the_model_is_loaded(inside, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a photo of a cat", "sed": 1, "num_step": 2, "tag": "x"}])
    lines = inside("batch", "in.jsonl", "-o", "out", *SMALL).stderr.splitlines()
    told = lines[: next(number for number, line in enumerate(lines) if line.startswith("loading"))]
    assert told[0] == (
        "keys that are no settings, kept under meta: sed (1 row; did you mean seed?), "
        "num_step (1 row; did you mean num_inference_steps?)"
    )
    assert told[1] == "tiny does not know the words photo, cat: it may draw an empty picture"
    strict = inside("batch", "in.jsonl", "-o", "strict", *SMALL, "--strict")
    assert strict.returncode == 0, strict.stderr  # a key is anybody's to keep


def test_tiny_says_what_it_draws_where_nobody_chose_it(inside, tmp_path: Path) -> None:
    done = inside("gen", "a red circle", "-o", "a")
    first, *rest = done.stderr.splitlines()
    assert first.startswith("no --model given and no CUDA GPU here") and 'for example "a red circle above' in first
    assert rest == ["loading tiny (float32) on cpu"]


def test_json_that_a_terminal_shows_has_no_code_in_it(inside, tmp_path: Path) -> None:
    done = inside("gen", "a red circle", "-o", "\x9b31m\u202e", "-m", "tiny", "--json")
    assert not {"\x9b", "\u202e"} & set(done.stdout)
    assert done.json["images"][0]["file_name"].startswith("\x9b31m\u202e/")
