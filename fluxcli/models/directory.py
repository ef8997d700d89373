"""Whether a directory is a pipeline that fluxcli runs: every part is looked at, by its configs and the heads of its
weight files, before the first is loaded. In steps, so that of a repository no more is fetched than was found good."""

import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError
from fluxcli.core.family import Family
from fluxcli.models.configs import read_config, scheduler_config, transformer_config
from fluxcli.models.files import MissingError, open_regular, read_json, shown
from fluxcli.models.single_files import weights_in
from fluxcli.models.weight_files import Weights

INDEX = "model_index.json"
# Each is a whole vocabulary. Where none is there, transformers makes an empty one up and says nothing.
SPIECE = ("spiece.model",)
VOCABULARIES = (("tokenizer.json",), SPIECE, ("vocab.json", "merges.txt"))
# What stores such tensors beside a weight, or in its place.
_QUANTISED = {
    "bitsandbytes": re.compile(r"\.((nested_)?(absmax|quant_map)|quant_state\.\w+|SCB|weight_format)$"),
    "optimum-quanto": re.compile(r"\.(_data|_scale)$"),
    "nunchaku, or GPTQ": re.compile(r"\.(qweight|qzeros|wscales)$"),
    "torchao": re.compile(r":_?(weight_)?(qdata|scale|int_data)$|\.(weight_)?qdata$"),
}


def check(directory: Path, family: Family, files: Mapping[str, Path], *, random: bool = False) -> None:
    """Raises ModelError for the first thing that keeps fluxcli from running the pipeline in `directory`.

    Args:
        files: single files, by the parts whose weights they hold instead.
        random: its weights are to be made up, and its tokenizers are another's.
    """
    check_index(directory, family)
    check_configs(directory, family, random=random)
    for name, part in family.parts.items():
        if part.weights and not random:
            check_weights(weights_in(directory, name, part, files))


def what_instead(names: Iterable[str]) -> str:
    """What files without a model_index.json are, in place of a pipeline."""
    files = sorted(Path(name).name for name in names)
    wanted = f"not a diffusers pipeline directory: it has no {INDEX}"
    if f"modular_{INDEX}" in files:
        return f"{wanted} but modular_{INDEX}, which fluxcli does not run"
    if "adapter_config.json" in files or any(re.search(r"lora.*\.safetensors$", file, re.I) for file in files):
        return f"{wanted}; it looks like a LoRA"
    for suffix, kind in ((".gguf", "quantised weights (GGUF)"), (".safetensors", "single-file weights")):
        if found := [file for file in files if file.endswith(suffix)]:
            return (
                f"{wanted}; it holds {kind}: {shown(found[0])}, to be given as a file of its own (-m or --transformer)"
            )
    return wanted


def check_index(directory: Path, family: Family) -> None:
    """model_index.json: of the family's pipeline, and with a class that fluxcli knows for each part."""
    path = directory / INDEX
    index = read_json(path)
    pipeline = index.get("_class_name")
    if isinstance(pipeline, list):  # [file, class] of a pipeline that brings its own code
        pipeline = pipeline[-1] if pipeline else None
    if pipeline not in family.pipelines:
        raise ModelError(f"{path}: fluxcli runs {family.pipelines[0]}, this is {shown(pipeline)}")
    for name in family.parts:
        class_of(path, index, name, family)


def class_of(path: Path, index: dict[str, Any], name: str, family: Family) -> str:
    """The class that is made for a part, of its family's package: one of a fixed table, whatever the file says.

    Raises:
        ModelError: the file, `path`, names another or none.
    """
    part, given = family.parts[name], index.get(name)
    if given in (None, [None, None]):
        raise ModelError(
            f"{path}: has no {name}, and fluxcli runs whole pipelines; give its transformer over another {family.name} "
            "(-m OTHER --transformer FILE)"
        )
    package, cls = given if isinstance(given, list) and len(given) == 2 else (None, given)
    made = part.classes.get(cls) if isinstance(cls, str) and package == part.package else None
    if made is None:
        known = ", ".join(part.classes)
        quantised = " (quantised weights)" if "nunchaku" in str(package) else ""
        raise ModelError(
            f"{path}: {name} is {shown(package)}.{shown(cls)}{quantised}; of {part.package} fluxcli takes {known}"
        )
    return made


def check_configs(directory: Path, family: Family, *, random: bool = False) -> None:
    """What is small of each part: its config, and a tokenizer's vocabulary."""
    for name, part in family.parts.items():
        if name == "transformer":
            transformer_config(directory / name, family)
        elif name == "scheduler":
            scheduler_config(directory / name)
        elif part.weights:
            read_config(directory / name)
        elif not random:
            check_vocabulary(directory / name)


def check_vocabulary(directory: Path) -> tuple[str, ...]:
    """The files of a tokenizer's vocabulary.

    Raises:
        ModelError: there is none, or none that can be read with what is installed.
    """
    for files in VOCABULARIES:
        if all(os.path.lexists(directory / file) for file in files):
            for file in files:
                open_regular(directory / file).close()
            if files == SPIECE and not _reads_spiece():
                raise ModelError(f"{directory}: has spiece.model alone; to read it: pip install 'fluxcli[spiece]'")
            return files
    wanted = ", or ".join(" and ".join(files) for files in VOCABULARIES)
    raise MissingError(f"{directory}: holds no vocabulary: {wanted}")


def _reads_spiece() -> bool:
    """Whether what transformers needs for it is installed."""
    try:
        return bool(find_spec("sentencepiece") and find_spec("google.protobuf"))
    except ModuleNotFoundError:  # no package `google` at all
        return False


def check_weights(weights: Weights) -> None:
    """Raises ModelError where heads tell that a part cannot be read: it is quantised, or lacks what its index names."""
    for (path, header), (_, placed) in zip(weights.heads(), weights.files, strict=True):
        for entry in header.entries:
            if kind := next((kind for kind, pattern in _QUANTISED.items() if pattern.search(entry.name)), None):
                raise ModelError(
                    f"{path}: holds {shown(entry.name)}: the weights are quantised ({kind}); fluxcli needs the "
                    "original ones"
                )
        if placed is not None and (absent := sorted(placed - {entry.name for entry in header.entries})):
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise ModelError(f"{path}: missing (the index places it there): {shown(absent[0])}{more}")
