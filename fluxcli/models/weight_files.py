"""Which weight files of a part are read, as diffusers and transformers choose among what `save_pretrained`, downloads
and conversions leave beside one another. Torch-free; for a directory and for a repository's list of files alike."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError
from fluxcli.core.family import Part
from fluxcli.models.files import MissingError, read_json, shown
from fluxcli.models.headers import Header, read_header

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_LISTED = 4  # files named in an error
ReadIndex = Callable[[str], dict[str, Any]]  # a file's name in the part's folder -> its JSON


@dataclass(frozen=True)
class WeightFile:
    """`tensors` are those that the index places there; None where there is no index to say."""

    name: str
    tensors: frozenset[str] | None = None


@dataclass(frozen=True)
class Weights:
    """Where the tensors of a part are.

    Attributes:
        where: the folder or the file, for messages.
        files: each with the tensors that an index places there; None where there is no index to say.
        prefix: what stands before the part's names; tensors without it are other parts'.
        layout: whose names those are.
    """

    where: Path
    files: Sequence[tuple[Path, frozenset[str] | None]]
    prefix: str = ""
    layout: str = ""

    def heads(self) -> Iterator[tuple[Path, Header]]:
        """Each file with its head, of which the part's own tensors are left, without the prefix."""
        for path, _ in self.files:
            yield path, read_header(path).within(self.prefix)


def weights_of(directory: Path, part: Part) -> Weights:
    """The weights in a part's folder, as `save_pretrained` lays them out.

    Raises:
        ModelError: there are none that fluxcli reads; the message says what is there instead.
    """
    return Weights(directory, weight_files(directory, part.package), layout=part.package)


def weight_files(directory: Path, package: str) -> list[tuple[Path, frozenset[str] | None]]:
    """The weight files of a part's folder, each with the tensors it must hold.

    Raises:
        ModelError: there are none that fluxcli reads; the message says what is there instead.
    """
    try:
        with os.scandir(directory) as entries:
            names = {entry.name for entry in entries if not entry.is_dir()}
    except OSError as error:
        raise MissingError(f"{directory}: missing from the model") from error
    chosen = choose(str(directory), names, package, lambda name: read_json(directory / name))
    return [(directory / each.name, each.tensors) for each in chosen]


def choose(where: str, names: Collection[str], package: str, read_index: ReadIndex) -> list[WeightFile]:
    """The files to read among `names`, which lie in the folder `where`.

    diffusers reads the index first, and the single file where there is no index; transformers the other way round.
    Without either, the only variant (`.fp16.`, `.bf16.`) there is.

    Raises:
        ModelError: as `weight_files`.
    """
    stem = _STEMS[package]
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if single in names and (package == "transformers" or index not in names):
        return [WeightFile(single)]
    if index in names:
        shards = _shards(where, index, read_index(index))
        absent = sorted(shard.name for shard in shards if shard.name not in names)
        if not absent:
            return shards
        # A single file saved over a sharded model leaves the index behind, and none of its shards.
        if single in names and len(absent) == len(shards):
            return [WeightFile(single)]
        beside = f"; remove {index} to read {single} instead" if single in names else ""
        raise MissingError(f"{where}: {_some(absent)} named in {index} but not there{beside}")
    if variants := _variants(stem, names):
        return _only_variant(where, stem, variants, names, read_index)
    raise _none(where, stem, names)


def _only_variant(
    where: str, stem: str, variants: list[str], names: Collection[str], read_index: ReadIndex
) -> list[WeightFile]:
    if len(variants) > 1:
        raise ModelError(
            f"{where}: has weights in the variants {_some(variants)}, and none without; keep one of them, or rename it "
            f"to {stem}.safetensors"
        )
    (variant,) = variants
    index = f"{stem}.safetensors.index.{variant}.json"
    if index not in names:
        return [WeightFile(f"{stem}.{variant}.safetensors")]
    shards = _shards(where, index, read_index(index))
    if absent := sorted(shard.name for shard in shards if shard.name not in names):
        raise MissingError(f"{where}: {_some(absent)} named in {index} but not there")
    return shards


def _variants(stem: str, names: Collection[str]) -> list[str]:
    single = re.compile(re.escape(stem) + r"\.(\w+)\.safetensors")
    index = re.compile(re.escape(stem) + r"\.safetensors\.index\.(\w+)\.json")
    return sorted({match[1] for name in names if (match := single.fullmatch(name) or index.fullmatch(name))})


def _shards(where: str, index: str, content: dict[str, Any]) -> list[WeightFile]:
    placed = content.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{where}/{index}: has no weight_map")
    tensors: dict[str, set[str]] = {}
    for name, file in placed.items():
        # A shard lies beside its index: a path could name any file of the reader's.
        if not isinstance(file, str) or re.search(r"[/\\\0]", file) or not file.endswith(".safetensors"):
            raise ModelError(f"{where}/{index}: names {shown(file)}, which is no safetensors file of this folder")
        tensors.setdefault(file, set()).add(name)
    return [WeightFile(file, frozenset(names)) for file, names in sorted(tensors.items())]


def _none(where: str, stem: str, names: Collection[str]) -> ModelError:
    """Says what is there in place of weights."""
    wanted = f"has neither {stem}.safetensors nor {stem}.safetensors.index.json"
    if any(re.match(re.escape(stem) + r"(\.\w+)?-\d+-of-\d+\.", name) for name in names):
        return MissingError(f"{where}: has shards without their index {stem}.safetensors.index.json")
    if pickles := sorted(name for name in names if name.endswith(_PICKLES)):
        return ModelError(
            f"{where}: {wanted}; {_some(pickles)} is not read: such files can run code when they are loaded. "
            "Convert it to safetensors (diffusers' save_pretrained writes it)"
        )
    if quantised := sorted(name for name in names if name.endswith(".gguf")):
        return ModelError(
            f"{where}: {wanted}; {_some(quantised)} is read where it is given by name (--transformer FILE)"
        )
    others = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("."))
    return MissingError(f"{where}: {wanted}" + (f"; there is {_some(others)}" if others else ""))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(shown, names[:_LISTED])) + more
