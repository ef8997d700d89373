"""Which directory a --model name means: a diffusers pipeline directory, a hub id, the built-in `tiny`, or
`random:flux-dev` / `random:flux-schnell`. Torch-free; of weight files no more than heads and samples."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxcli.core.config import MAX_STEPS, RowDefaults
from fluxcli.core.errors import ModelError
from fluxcli.core.family import Family
from fluxcli.models import hub
from fluxcli.models.adapters.library import Library
from fluxcli.models.configs import read_config, transformer_config
from fluxcli.models.directory import INDEX, check, class_of, what_instead
from fluxcli.models.files import read_json, shown
from fluxcli.models.fingerprint import VERSION, fingerprint, legacy_fingerprint
from fluxcli.models.flux1.family import FLUX1

BUILT_IN = Path(__file__).parent
HUB_DEFAULT = "black-forest-labs/FLUX.1-dev"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_URL = re.compile(r"https?://[^/]+/([\w.-]+/[\w.-]+)")
# What a name ends in that is one file, and what to say of it.
_FILES = {
    ".gguf": "a GGUF file (quantised weights)",
    ".dduf": "a DDUF file",
    **dict.fromkeys((".safetensors", ".sft"), "a single file of weights"),
    **dict.fromkeys((".ckpt", ".bin", ".pt", ".pth"), "a pickle, which can run code when it is loaded"),
}
_PIPELINES = "fluxcli reads diffusers pipeline directories, with a model_index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A resolved --model. `revision` is the hub's commit; `random` means weights are made up, not read."""

    name: str
    directory: Path
    revision: str | None = None
    random: bool = False
    family: Family = FLUX1

    @cached_property
    def transformer(self) -> dict[str, Any]:
        """transformer/config.json, its defaults filled in."""
        return transformer_config(self.directory / "transformer", self.family)

    def class_of(self, part: str) -> tuple[str, str]:
        """(package, class) that a part is made with."""
        path = self.directory / INDEX
        return self.family.parts[part].package, class_of(path, read_json(path), part, self.family)

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
        return bool(self.transformer["guidance_embeds"])

    @cached_property
    def adapters(self) -> Library:
        """What is known of adapter files for it."""
        return Library(lambda part: self.transformer if part == "transformer" else read_config(self.directory / part))

    def row_defaults(self) -> RowDefaults:
        """What the model itself suggests: its fluxcli.json where it has one, else its family's habits.

        Raises:
            ModelError: the file suggests what no row may have.
        """
        path, family = self.directory / "fluxcli.json", self.family
        given = read_json(path) if path.is_file() else {}

        def suggested(key: str, default: int, fits: Callable[[int], bool]) -> int:
            value = given.get(key, default)
            if type(value) is not int or not fits(value):
                raise ModelError(f"{path}: {key} cannot be {shown(value)}")
            return value

        return RowDefaults(
            width=suggested("width", family.side, family.draws),
            height=suggested("height", family.side, family.draws),
            num_inference_steps=suggested(
                "num_inference_steps",
                # FLUX.1-schnell, the timestep-distilled one, is told by its missing guidance embedding.
                family.guided_steps if self.takes_guidance else family.steps,
                lambda steps: 1 <= steps <= MAX_STEPS,
            ),
            guidance_scale=family.guidance if self.takes_guidance else None,
            adapter=self.adapters.adapter,
        )

    def fingerprint(self, known: str | None = None) -> str:
        """A digest that changes when the images may.

        Args:
            known: a fingerprint to compare it with; where an earlier version made that, this is made the same way.
        """
        legacy = known is not None and not known.startswith(VERSION)
        return self._legacy_fingerprint if legacy else self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.directory, self.family, self.random)

    @cached_property
    def _legacy_fingerprint(self) -> str:
        return legacy_fingerprint(self.directory, self.family, self.random)


def resolve(name: str, revision: str | None = None) -> Checkpoint:
    """Finds the pipeline directory behind `name`, downloading it from the hub where needed, and looks at every part.

    Raises:
        ModelError: no such directory or repository, a revision where none applies, or not a FLUX pipeline that can be
            loaded.
    """
    if name == "tiny" or name.startswith("random:"):
        checkpoint = _built_in(name)
    elif (directory := Path(name).expanduser()).is_dir():
        checkpoint = Checkpoint(name, _pipeline(name, directory))
    elif (reason := _no_hub_id(name)) is None:
        directory = hub.fetch(name, revision, FLUX1)
        checkpoint = Checkpoint(name, directory, revision=directory.name)
    else:
        raise ModelError(f"--model {shown(name)}: {reason}")
    if revision is not None and checkpoint.revision is None:
        raise ModelError(f"--revision {revision}: only a model from the hub has revisions, and {name} is not one")
    check(checkpoint.directory, checkpoint.family, random=checkpoint.random)
    checkpoint.row_defaults()
    return checkpoint


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


def _pipeline(name: str, directory: Path) -> Path:
    """`directory`, which must have a model_index.json."""
    if (directory / INDEX).exists():
        return directory
    if (directory / "snapshots").is_dir() and (directory / "refs").is_dir():
        snapshots = sorted(str(each) for each in (directory / "snapshots").iterdir())
        id = directory.name.removeprefix("models--").replace("--", "/")
        inside = f", or {snapshots[0]}" if snapshots else ""
        raise ModelError(f"--model {name}: has no {INDEX}: it is the hub's cache of a repository; give {id}{inside}")
    raise ModelError(f"--model {name}: {what_instead(path.name for path in directory.iterdir())}")


def _no_hub_id(name: str) -> str | None:
    """Why a name that is no directory cannot be a hub id either; None if it can."""
    path = Path(name).expanduser()
    kind = _FILES.get(path.suffix.lower())
    if path.exists():
        return f"is {kind or 'a file'}; {_PIPELINES}"
    if match := _URL.match(name):
        return f"is an address; give the repository's id: {match[1]}"
    id, at, revision = name.partition("@")
    if at and _HUB_ID.fullmatch(id):
        return f"no such directory; a hub id's revision is an option: -m {id} --revision {revision}"
    if kind:
        return f"no such file; and it would be {kind}: {_PIPELINES}"
    if _HUB_ID.fullmatch(name):
        return None
    id = "/".join(name.split("/")[:2])
    if name.count("/") > 1 and _HUB_ID.fullmatch(id):
        return f"no such directory; if it is in a repository of the hub, give the repository's id: {id}"
    return "no such directory, and not a hub id (owner/name), tiny, random:flux-dev or random:flux-schnell"
