"""What a --model name means: a diffusers pipeline directory, a hub id, a single file, the built-in `tiny`, or
`random:flux-dev` / `random:flux-schnell`; and single files in place of a part's weights. Torch-free; of weight files no
more than heads and samples."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fluxcli.core.config import MAX_STEPS, RowDefaults
from fluxcli.core.errors import ModelError
from fluxcli.core.family import Family
from fluxcli.models import hub
from fluxcli.models.adapters.catalog import Catalog
from fluxcli.models.configs import read_config, transformer_config
from fluxcli.models.directory import INDEX, check, check_weights, class_of, what_instead
from fluxcli.models.files import read_json, shown
from fluxcli.models.fingerprint import VERSION, fingerprint, legacy_fingerprint
from fluxcli.models.flux1.family import FLUX1
from fluxcli.models.single_files import SUFFIXES, parts_in, transformer_sizes, weights_in
from fluxcli.models.weight_files import Weights

BUILT_IN = Path(__file__).parent
HUB_DEFAULT = "black-forest-labs/FLUX.1-dev"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/(.+)")
_URL = re.compile(r"https?://[^/]+/([\w.-]+/[\w.-]+)")
# What a name ends in that is one file which is not read, and what to say of it.
_FILES = {
    ".dduf": "a DDUF file",
    **dict.fromkeys((".ckpt", ".bin", ".pt", ".pth"), "a pickle, which can run code when it is loaded"),
}
_READ = f"fluxcli reads diffusers pipeline directories, with a model_index.json, and files of {', '.join(SUFFIXES)}"
FILE_PARTS = tuple(part for part, about in FLUX1.parts.items() if about.layouts)
_OPTIONS = {part: f"--{part.replace('_', '-')}" for part in FILE_PARTS}


@dataclass(frozen=True)
class Checkpoint:
    """A resolved --model. `revision` is the hub's commit; `random` means weights are made up, not read; `files` are
    single files, by the parts whose weights they hold in place of the directory's."""

    name: str
    directory: Path
    revision: str | None = None
    random: bool = False
    family: Family = FLUX1
    files: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def transformer(self) -> dict[str, Any]:
        """transformer/config.json, its defaults filled in; of a single file, as that says."""
        file = self.files.get("transformer")
        sizes = transformer_sizes(file, self.family.parts["transformer"]) if file else None
        return transformer_config(self.directory / "transformer", self.family, sizes)

    def weights(self, part: str) -> Weights:
        """Where a part's weights are."""
        return weights_in(self.directory, part, self.family.parts[part], self.files)

    def class_of(self, part: str) -> tuple[str, str]:
        """(package, class) that a part is made with."""
        path = self.directory / INDEX
        return self.family.parts[part].package, class_of(path, read_json(path), part, self.family)

    @property
    def label(self) -> str:
        """The name that images carry. Of a local path its last part: where somebody keeps models is not for others."""
        if file := self.files.get("transformer"):
            return file.name
        return self.name if self.revision else os.path.basename(os.path.abspath(self.name))

    @property
    def scheduler(self) -> Path:
        """The directory of its config. Of a single file alone, FLUX.1's own: by whether it takes a guidance scale."""
        if self.directory == BUILT_IN / "flux-dev" and not self.takes_guidance:
            return BUILT_IN / "flux-schnell" / "scheduler"
        return self.directory / "scheduler"

    @property
    def tokenizers(self) -> Path:
        """The pipeline directory whose tokenizers to use; a model with random weights borrows the built-in ones."""
        return BUILT_IN / "tiny" if self.random else self.directory

    @cached_property
    def takes_guidance(self) -> bool:
        return bool(self.transformer["guidance_embeds"])

    @cached_property
    def adapters(self) -> Catalog:
        """What is known of adapter files for it."""
        return Catalog(self._config)  # no closure: a checkpoint is sent to other processes

    def _config(self, part: str) -> Mapping[str, Any]:
        return self.transformer if part == "transformer" else read_config(self.directory / part)

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
        return fingerprint(self.directory, self.family, self.files, self.random)

    @cached_property
    def _legacy_fingerprint(self) -> str:
        return legacy_fingerprint(self.directory, self.family, self.random)


def resolve(
    name: str, revision: str | None = None, files: Mapping[str, str | os.PathLike[str]] | None = None
) -> Checkpoint:
    """Finds the model behind `name`, downloading it from the hub where needed, and looks at every part.

    Args:
        files: single files in place of a part's weights, by the part.

    Raises:
        ModelError: no such directory, repository or file, a revision where none applies, or not a FLUX pipeline that
            can be loaded.
    """
    given = {part: _part(part, _file(_OPTIONS[part], os.fspath(file))) for part, file in (files or {}).items()}
    path = Path(name).expanduser()
    if name == "tiny" or name.startswith("random:"):
        checkpoint = _built_in(name)
    elif path.is_dir():
        checkpoint = Checkpoint(name, _pipeline(name, path))
    elif path.suffix.lower() in SUFFIXES and not _URL.match(name):
        checkpoint = _single(name, given)
    elif (reason := _no_hub_id(name)) is None:
        directory = hub.fetch(name, revision, FLUX1, given)
        checkpoint = Checkpoint(name, directory, revision=directory.name)
    else:
        raise ModelError(f"--model {shown(name)}: {reason}")
    if revision is not None and checkpoint.revision is None:
        raise ModelError(f"--revision {revision}: only a model from the hub has revisions, and {name} is not one")
    if given and checkpoint.random:
        raise ModelError(
            f"{_OPTIONS[next(iter(given))]}: the weights of {name} are made up, and no file is read for them"
        )
    checkpoint = replace(checkpoint, files={**checkpoint.files, **given})
    check(checkpoint.directory, checkpoint.family, checkpoint.files, random=checkpoint.random)
    checkpoint.row_defaults()
    return checkpoint


def _file(option: str, name: str) -> Path:
    """The file that an option names."""
    path = Path(name).expanduser()
    if kind := _FILES.get(path.suffix.lower()):
        raise ModelError(f"{option} {shown(name)}: is {kind}; {_READ}")
    if not path.exists():
        match = _HUB_FILE.fullmatch(name)
        hint = f"; one of a repository is fetched by: hf download {match[1]} {match[2]}" if match else ""
        raise ModelError(f"{option} {shown(name)}: no such file{shown(hint)}")
    return path


def _part(part: str, file: Path) -> Path:
    """`file`, which is to hold a part: looked at before anything is downloaded for the others."""
    about = FLUX1.parts[part]
    check_weights(weights_in(Path(), part, about, {part: file}))
    if part == "transformer":
        transformer_sizes(file, about)
    return file


def _single(name: str, given: Mapping[str, Path]) -> Checkpoint:
    """A file with a transformer, and what else it holds; configs and tokenizers are FLUX.1's own."""
    path = _file("--model", name)
    held = parts_in(path, FLUX1)
    if "transformer" not in held:
        raise ModelError(
            f"--model {name}: holds no transformer but {' and '.join(held)}; give it as {_OPTIONS[held[0]]}"
        )
    files = {**{part: _part(part, path) for part in held}, **given}
    if lacking := [option for part, option in _OPTIONS.items() if part not in files]:
        raise ModelError(
            f"--model {name}: holds the {' and '.join(held)} alone; give {', '.join(lacking)} too, or give it as "
            "--transformer over another's pipeline (-m black-forest-labs/FLUX.1-dev)"
        )
    return Checkpoint(name, BUILT_IN / "flux-dev", files=files)


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
    """Why a name that is no directory and no file of weights cannot be a hub id either; None if it can."""
    path = Path(name).expanduser()
    kind = _FILES.get(path.suffix.lower())
    if path.exists():
        return f"is {kind or 'a file'}; {_READ}"
    if match := _URL.match(name):
        return f"is an address; give the repository's id: {match[1]}"
    id, at, revision = name.partition("@")
    if at and _HUB_ID.fullmatch(id):
        return f"no such directory; a hub id's revision is an option: -m {id} --revision {revision}"
    if kind:
        return f"no such file; and it would be {kind}: {_READ}"
    if _HUB_ID.fullmatch(name):
        return None
    id = "/".join(name.split("/")[:2])
    if name.count("/") > 1 and _HUB_ID.fullmatch(id):
        return f"no such directory; if it is in a repository of the hub, give the repository's id: {id}"
    return "no such directory, and not a hub id (owner/name), tiny, random:flux-dev or random:flux-schnell"
