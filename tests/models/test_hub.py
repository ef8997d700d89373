"""Models from the hub: no more is fetched than is read, what is wrong is told before the weights are fetched, and what
is in the cache is enough without network, whoever put it there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.conftest import WEIGHTS, edit, shard
from tests.models.hub import COMMIT, Hub
from tests.single_files import bfl, save, tensors

ID = "someone/flux"
READ = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "vae/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
}
WEIGHTS_READ = {f"{part}/{file}" for part, file in WEIGHTS.items()}

ALONE = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", "CUDA_VISIBLE_DEVICES": ""}

RESOLVE = """
import sys
from fluxcli.core.errors import ModelError
from fluxcli.models.checkpoints import resolve
try:
    checkpoint = resolve(sys.argv[1], sys.argv[2] or None, {"transformer": sys.argv[3]} if sys.argv[3] else {})
    print(checkpoint.revision, checkpoint.fingerprint())
except ModelError as error:
    print("Error:", error)
assert not {"torch", "transformers", "diffusers"} & sys.modules.keys()
"""


def resolve(
    home: Path, id: str = ID, address: str = "http://127.0.0.1:9", revision: str = "", file: str = "", **env: str
) -> str:
    """What a process of its own makes of a hub id: huggingface_hub reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, id, revision, file],
        capture_output=True, text=True, cwd=home.parent,
        env={**os.environ, **ALONE, "HF_HOME": str(home), "HF_ENDPOINT": address, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "hf"


def test_exactly_what_is_read_is_fetched_and_is_enough_offline(model: Path, home: Path) -> None:
    for beside in ("pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "flax_model.msgpack", "README.md", ".gitattributes", "x.png"):  # fmt: skip  # noqa: E501
        for part in ("transformer", "text_encoder_2", "tokenizer"):
            (model / part / beside).write_text("x")
    (model / "flux1-dev.safetensors").write_text("x")
    with Hub(ID, model).serving() as hub:
        online = resolve(home, address=hub.address)
        assert online.startswith(f"{COMMIT} 2:")
        assert hub.fetched == READ | WEIGHTS_READ
        asked = len(hub.asked)
        assert resolve(home, address=hub.address) == online
        assert len(hub.asked) <= asked + 3  # whether the branch moved, and no file again
    assert resolve(home) == online  # the hub cannot be reached
    assert resolve(home, HF_HUB_OFFLINE="1") == online
    assert resolve(home, HF_HUB_OFFLINE="1", revision=COMMIT) == online


def cached(model: Path, home: Path, *without: str) -> Path:
    """A cache as others leave it: links to blobs, a list of all that the repository has, some of it not fetched."""
    folder = home / "hub" / "models--someone--flux"
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        name = path.relative_to(model).as_posix()
        if not name.startswith(without or ("-",)):
            blob, link = folder / "blobs" / name.replace("/", "-"), folder / "snapshots" / COMMIT / name
            for each in (blob, link):
                each.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    everything = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    (folder / "trees").mkdir(exist_ok=True)
    entries = {name: {"size": 1, "blob_id": "0" * 40} for name in (*everything, "README.md", "vae/README.md")}
    (folder / "trees" / f"{COMMIT}.json").write_text(json.dumps(entries))
    return folder / "snapshots" / COMMIT


def test_a_cache_that_another_program_filled_is_enough_offline(model: Path, home: Path) -> None:
    (model / "text_encoder_2" / "pytorch_model.bin").write_text("x")
    cached(model, home, "text_encoder_2/pytorch_model.bin")
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert resolve(home, **env).startswith(f"{COMMIT} 2:")


@pytest.mark.parametrize("gone", ["transformer/diffusion", "vae", "tokenizer_2", "model_index.json"])
def test_a_download_that_broke_off_is_told_offline(model: Path, home: Path, gone: str) -> None:
    cached(model, home, gone)
    message = resolve(home, HF_HUB_OFFLINE="1")
    assert message.startswith(f"Error: --model {ID}: ")
    assert gone.partition("/")[0] in message
    assert message.endswith("The copy in the local cache is incomplete: run once with network")


def test_a_download_that_broke_off_goes_on_online(model: Path, home: Path) -> None:
    with Hub(ID, model).serving() as hub:
        snapshot = cached(model, home, "transformer/diffusion")
        (snapshot.parents[1] / "trees" / f"{COMMIT}.json").unlink()
        assert resolve(home, address=hub.address).startswith(f"{COMMIT} 2:")
        assert hub.fetched == {f"transformer/{WEIGHTS['transformer']}"}


def test_a_download_that_breaks_off_says_how_to_go_on(model: Path, home: Path) -> None:
    with Hub(ID, model).serving() as hub:
        hub.cut = {f"transformer/{WEIGHTS['transformer']}"}
        told = resolve(home, address=hub.address)
        assert told == (
            f"Error: --model {ID}: the download broke off; what came is kept: run the same command again to go on"
        )
        hub.cut = set()
        hub.fetched.clear()
        assert resolve(home, address=hub.address).startswith(COMMIT)
        assert f"transformer/{WEIGHTS['transformer']}" in hub.fetched and not hub.fetched & READ


def test_a_downloads_progress_is_told_on_stderr(model: Path, home: Path) -> None:
    with Hub(ID, model).serving() as hub:
        told = subprocess.run(
            [sys.executable, "-c", RESOLVE, ID, "", ""],
            capture_output=True, text=True, cwd=home.parent,
            env={**os.environ, **ALONE, "HF_HOME": str(home), "HF_ENDPOINT": hub.address},
        )  # fmt: skip
    assert told.stdout.startswith(COMMIT) and len(told.stdout.splitlines()) == 1
    assert "100%" in told.stderr and "Fetching" in told.stderr


@pytest.mark.parametrize("beside", [True, False])
def test_of_a_sharded_repository_the_index_says_what_is_fetched(model: Path, home: Path, beside: bool) -> None:
    single = (model / "transformer" / WEIGHTS["transformer"]).read_bytes()
    index = shard(model / "transformer" / WEIGHTS["transformer"])
    shards = {f"transformer/{path.name}" for path in index.parent.glob("*-of-*")}
    if beside:
        (model / "transformer" / WEIGHTS["transformer"]).write_bytes(single)
    with Hub(ID, model).serving() as hub:
        assert resolve(home, address=hub.address).startswith(COMMIT)
    expected = READ | WEIGHTS_READ - {f"transformer/{WEIGHTS['transformer']}"} | shards | {f"transformer/{index.name}"}
    assert hub.fetched == expected


def test_of_a_part_with_a_file_of_its_own_no_weights_are_fetched(model: Path, home: Path) -> None:
    file = save(home.parent / "flux1.safetensors", bfl(tensors(model, "transformer")))
    with Hub(ID, model).serving() as hub:
        assert resolve(home, address=hub.address, file=str(file)).startswith(COMMIT)
        assert hub.fetched == READ | WEIGHTS_READ - {f"transformer/{WEIGHTS['transformer']}"}
    assert resolve(home, file=str(file), HF_HUB_OFFLINE="1").startswith(COMMIT)
    assert "incomplete" in resolve(home, HF_HUB_OFFLINE="1")


def test_a_file_that_is_no_part_costs_no_download(home: Path, model: Path) -> None:
    file = save(home.parent / "flux1.safetensors", tensors(model, "vae"))
    with Hub(ID, model).serving() as hub:
        assert "holds no transformer" in resolve(home, address=hub.address, file=str(file))
    assert not hub.asked


def test_a_pipeline_of_another_class_costs_one_small_file(model: Path, home: Path) -> None:
    edit(model / "model_index.json", _class_name="FluxFillPipeline")
    with Hub(ID, model).serving() as hub:
        assert "this is FluxFillPipeline" in resolve(home, address=hub.address)
    assert hub.fetched == {"model_index.json"}


def test_fills_weights_under_another_name_are_not_fetched(model: Path, home: Path) -> None:
    edit(model / "transformer" / "config.json", in_channels=384, out_channels=64)
    with Hub(ID, model).serving() as hub:
        assert "takes 384 channels and makes 64: FLUX.1 Fill" in resolve(home, address=hub.address)
    assert not hub.fetched & WEIGHTS_READ


def test_without_a_vocabulary_no_weights_are_fetched(model: Path, home: Path) -> None:
    (model / "tokenizer_2" / "tokenizer.json").unlink()
    with Hub(ID, model).serving() as hub:
        assert "tokenizer_2: holds no vocabulary" in resolve(home, address=hub.address)
    assert not hub.fetched & WEIGHTS_READ


def test_quantised_weights_are_not_fetched(model: Path, home: Path) -> None:
    edit(model / "text_encoder_2" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with Hub(ID, model).serving() as hub:
        assert "quantised (bitsandbytes)" in resolve(home, address=hub.address)
    assert not hub.fetched & WEIGHTS_READ


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["flux1-dev-Q8_0.gguf"], "it holds quantised weights (GGUF): flux1-dev-Q8_0.gguf"),
        (["realism_lora.safetensors"], "it looks like a LoRA"),
        (["flux1-dev-fp8.safetensors"], "it holds single-file weights: flux1-dev-fp8.safetensors"),
        (["README.md"], "it has no model_index.json"),
    ],
)
def test_a_repository_that_is_no_pipeline_is_told_for_what_it_is(
    files: list[str], message: str, home: Path, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / "repository").mkdir(exist_ok=True)
        (tmp_path / "repository" / file).write_text("x")
    with Hub(ID, tmp_path / "repository").serving() as hub:
        assert message in resolve(home, address=hub.address)
    assert not hub.fetched


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "no such repository on the hub (or it is private: set HF_TOKEN), nor such a directory"),
        ("gated", "the repository is gated; accept its licence on the hub and set HF_TOKEN"),
        (429, "the hub asks to wait (429 Too Many Requests)"),
        (503, "not in the local cache, and the hub answered 503"),
    ],
)
def test_the_hubs_refusals_are_told_apart(model: Path, home: Path, status: int | str, message: str) -> None:
    with Hub(ID, model, status).serving() as hub:
        told = resolve(home, address=hub.address)
    assert told.startswith(f"Error: --model {ID}: ") and message in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("status", [404, 503])
def test_what_is_cached_is_used_whatever_the_hub_says(model: Path, home: Path, status: int | str) -> None:
    cached(model, home)
    with Hub(ID, model, status).serving() as hub:
        assert resolve(home, address=hub.address).startswith(COMMIT)


def test_what_is_neither_cached_nor_there_is_told(home: Path) -> None:
    told = resolve(home, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in told and "there is no directory of that name either" in told
