"""What --model may be, and what is said of what it cannot be."""

import pickle
from pathlib import Path

import pytest

from fluxcli.core.errors import ModelError
from fluxcli.models.checkpoints import resolve

NAMES = {
    "x.ckpt": "is a pickle, which can run code",
    "x.dduf": "is a DDUF file",
    "notes": "is a file; fluxcli reads diffusers pipeline directories",
    "models/gone.safetensors": "no such file$",
    "gone.ckpt": "no such file; and it would be a pickle",
    "https://huggingface.co/org/FLUX.1-dev": "is an address; give the repository's id: org/FLUX.1-dev",
    "https://huggingface.co/org/name/blob/main/x.safetensors": "is an address; give the repository's id: org/name",
    "org/FLUX.1-dev@main": "a hub id's revision is an option: -m org/FLUX.1-dev --revision main",
    "org/FLUX.1-dev/transformer": "if it is in a repository of the hub, give the repository's id: org/FLUX.1-dev",
    "org/FLUX.1-dev/flux1-dev.safetensors": "one of a repository is fetched by: hf download org/FLUX.1-dev flux1",
    "./nothere": "no such directory, and not a hub id",
    "flux-dev": "no such directory, and not a hub id",
    "models": r"it has no model_index.json; it holds single-file weights: x.safetensors",
    "empty": r"not a diffusers pipeline directory: it has no model_index.json$",
    "lora": r"it has no model_index.json; it looks like a LoRA",
    "gguf": r"it holds quantised weights \(GGUF\): flux1-dev-Q8_0.gguf",
    "models--org--name": r"it is the hub's cache of a repository; give org/name, or models--org--name/snapshots/abc",
}


FILES = (
    *("x.safetensors", "x.gguf", "x.ckpt", "x.dduf", "notes", "models/x.safetensors", "lora/my_LoRA.safetensors"),
    *("gguf/flux1-dev-Q8_0.gguf", "models--org--name/snapshots/abc/x", "models--org--name/refs/main", "empty/.keep"),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_model_is_told_for_what_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in FILES:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("x")
    with pytest.raises(ModelError, match=NAMES[name]) as refused:
        resolve(name)
    assert str(refused.value).startswith(f"--model {name}: ")


def test_a_tilde_that_no_shell_has_seen_is_the_home_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve("~/model").directory == model


def test_a_checkpoint_goes_to_another_process() -> None:
    """As `bench --cold-start` sends it, with what was looked up of adapters already."""
    checkpoint = resolve("tiny")
    checkpoint.row_defaults()
    there = pickle.loads(pickle.dumps(checkpoint))
    assert there == checkpoint and there.fingerprint() == checkpoint.fingerprint()
    assert there.adapters is not None
