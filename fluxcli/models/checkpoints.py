"""Which directory a --model name means: a diffusers pipeline directory, a hub id, the built-in `tiny`, or
`random:flux-dev` / `random:flux-schnell`. Torch-free; reads configs, never weights."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxcli.core.config import GUIDANCE, RowDefaults
from fluxcli.core.errors import ModelError

BUILT_IN = Path(__file__).parent
HUB_DEFAULT = "black-forest-labs/FLUX.1-dev"
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAMPLE = 2**16  # bytes read from each end of a weight file for its fingerprint


@dataclass(frozen=True)
class Checkpoint:
    """A resolved --model. `revision` is the hub's commit; `random` means weights are made up, not read."""

    name: str
    directory: Path
    revision: str | None = None
    random: bool = False

    @cached_property
    def transformer(self) -> dict[str, Any]:
        return read_json(self.directory / "transformer" / "config.json")

    @property
    def label(self) -> str:
        """The name that images carry. Of a local path its last part: where somebody keeps models is not for others."""
        return self.name if self.revision else os.path.basename(os.path.abspath(self.name))

    @property
    def tokenizers(self) -> Path:
        """The pipeline directory whose tokenizers to use; a model with random weights borrows the built-in ones."""
        return BUILT_IN / "tiny" if self.random else self.directory

    @cached_property
    def takes_guidance(self) -> bool:
        return bool(self.transformer.get("guidance_embeds", False))

    def row_defaults(self) -> RowDefaults:
        """What the model itself suggests: its fluxcli.json where it has one, else FLUX.1's own habits."""
        own = self.directory / "fluxcli.json"
        given = read_json(own) if own.is_file() else {}
        return RowDefaults(
            width=given.get("width", 1024),
            height=given.get("height", 1024),
            # FLUX.1-schnell, the timestep-distilled one, is told by its missing guidance embedding.
            num_inference_steps=given.get("num_inference_steps", 28 if self.takes_guidance else 4),
            guidance_scale=GUIDANCE if self.takes_guidance else None,
        )

    def fingerprint(self) -> str:
        """Changes when the pictures may: every config and tokenizer file, and of every weight file the size, the header
        (names, shapes, dtypes) and the first and last bytes of the data. Cheap: nothing large is read whole."""
        digest = hashlib.sha256(b"random" if self.random else b"")
        for path in sorted(path for part in PARTS for path in (self.directory / part).glob("*") if path.is_file()):
            digest.update(f"\0{path.relative_to(self.directory).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                if path.suffix == ".safetensors":
                    digest.update(file.read(8 + int.from_bytes(file.read(8), "little")))
                    digest.update(file.read(_SAMPLE))
                    file.seek(max(file.tell(), path.stat().st_size - _SAMPLE))
                digest.update(file.read())
        return digest.hexdigest()[:32]


def resolve(name: str, revision: str | None = None) -> Checkpoint:
    """Finds the pipeline directory behind `name`, downloading it from the hub where needed.

    Raises:
        ModelError: no such directory or repository, a revision where none applies, or not a FLUX pipeline.
    """
    if name == "tiny" or name.startswith("random:"):
        checkpoint = _built_in(name)
    elif Path(name).is_dir():
        checkpoint = Checkpoint(name, Path(name))
    elif _HUB_ID.fullmatch(name) and not name.startswith((".", "/")):
        return _checked(_from_hub(name, revision))
    else:
        raise ModelError(
            f"--model {name}: no such directory, and not a hub id (owner/name), "
            "tiny, random:flux-dev or random:flux-schnell"
        )
    if revision is not None:
        raise ModelError(f"--revision {revision}: only a model from the hub has revisions, and {name} is not one")
    return _checked(checkpoint)


def _built_in(name: str) -> Checkpoint:
    if name == "tiny":
        return Checkpoint(name, BUILT_IN / "tiny")
    architecture = name.removeprefix("random:")
    known = [path.name for path in sorted(BUILT_IN.glob("flux-*"))]
    if architecture not in known:
        raise ModelError(
            f"--model {name}: no such architecture; there are {', '.join('random:' + each for each in known)}"
        )
    return Checkpoint(name, BUILT_IN / architecture, random=True)


def _from_hub(name: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # Only the diffusers layout: the repository also holds the same weights as one 24 GB file.
        directory = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["model_index.json", *(f"{part}/*" for part in PARTS)]
            )
        )
    except GatedRepoError as error:
        raise ModelError(
            f"--model {name}: the repository is gated; accept its licence on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"--model {name}: no such repository on the hub (or it is private: set HF_TOKEN)") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"--model {name}: not in the local cache, and the hub cannot be reached; "
            "check the network, HF_HUB_OFFLINE and HF_HOME"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"--model {name}: the hub answered: {str(error).strip().splitlines()[0]}") from error
    return Checkpoint(name, directory, revision=directory.name)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    index = checkpoint.directory / "model_index.json"
    if not index.is_file():
        raise ModelError(f"--model {checkpoint.name}: not a diffusers pipeline directory: it has no model_index.json")
    pipeline = read_json(index).get("_class_name")
    if pipeline != "FluxPipeline":
        raise ModelError(f"{index}: fluxcli runs FluxPipeline, this is {pipeline}")
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's file.

    Raises:
        ModelError: naming the file, where it is missing or not JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing from the model") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value
