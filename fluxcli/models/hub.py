"""A repository of the hub -> its snapshot in the local cache, with exactly the files that fluxcli reads: first those
that say whether it is a model that fluxcli runs, and the weights last."""

import glob
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError, first_line
from fluxcli.core.family import Family
from fluxcli.models.directory import INDEX, VOCABULARIES, check, check_configs, check_index, what_instead
from fluxcli.models.files import MissingError, read_json, shown
from fluxcli.models.fingerprint import TOKENIZER_CONFIGS
from fluxcli.models.weight_files import choose

Names = list[str]  # paths within a repository
_SECONDS = 10  # for the hub's first answer
_UNREACHABLE = (
    "not in the local cache, and the hub cannot be reached; check the network, HF_HUB_OFFLINE and HF_HOME (there is no "
    "directory of that name either)"
)
_BROKEN_OFF = "the download broke off; what came is kept: run the same command again to go on"


def fetch(name: str, revision: str | None, family: Family, files: Mapping[str, Path]) -> Path:
    """The snapshot of `name` at `revision` (None: the default branch); its folder is named by its commit. Without the
    weights of the parts that have `files` of their own.

    What is in the cache is not fetched again. Without network the cache's latest is taken, as it is.

    Raises:
        ModelError: what the hub or the cache lacks, and what to do.
    """
    try:
        commit, names = _list(name, revision)
    except ModelError as unreachable:
        directory = _snapshot(name, revision)
        if directory is None:
            raise unreachable from None
        _check_cached(name, directory, family, files)
        return directory
    if INDEX not in names:
        raise ModelError(f"--model {name}: {what_instead(names)}")
    directory = _index(name, revision)
    if directory.name != commit:  # the branch moved meanwhile
        return fetch(name, directory.name, family, files)
    check_index(directory, family)
    folders: dict[str, Names] = {folder: [] for folder in family.parts}
    for each in names:
        folder, _, file = each.rpartition("/")
        folders.get(folder, []).append(file)
    configs = {folder: _small_files(part.config, folders[folder]) for folder, part in family.parts.items()}
    _download(name, directory, [f"{folder}/{file}" for folder, files in configs.items() for file in files])
    check_configs(directory, family)
    weights: Names = []
    for folder, part in family.parts.items():
        if part.weights and folder not in files:

            def read_index(file: str, folder: str = folder) -> dict[str, Any]:
                _download(name, directory, [f"{folder}/{file}"])
                return read_json(directory / folder / file)

            chosen = choose(f"--model {name}: {folder}", folders[folder], part.package, read_index)
            weights += [f"{folder}/{each.name}" for each in chosen]
    _download(name, directory, weights)
    return directory


def _small_files(config: str, names: Iterable[str]) -> Names:
    """Those of a part's files that say what it is, and a tokenizer's vocabulary."""
    if config in TOKENIZER_CONFIGS:
        return sorted({*TOKENIZER_CONFIGS, *(file for files in VOCABULARIES for file in files)}.intersection(names))
    return sorted({config, "quantization_map.json"}.intersection(names))


def _list(name: str, revision: str | None) -> tuple[str, Names]:
    """(commit, every file) of the repository, from the hub.

    Raises:
        ModelError: why the hub does not say.
    """
    from huggingface_hub import HfApi

    with _faults(name, revision):
        info = HfApi().model_info(name, revision=revision, timeout=_SECONDS)
    return str(info.sha), [each.rfilename for each in info.siblings or ()]


def _index(name: str, revision: str | None) -> Path:
    """The snapshot that holds the revision's model_index.json."""
    from huggingface_hub import hf_hub_download

    with _faults(name, revision):
        return Path(hf_hub_download(name, INDEX, revision=revision)).parent


def _download(name: str, directory: Path, files: Names) -> None:
    """Fetches those of `files` that the snapshot lacks."""
    from huggingface_hub import snapshot_download

    missing = [file for file in files if not (directory / file).exists()]
    if missing:
        with _faults(name, directory.name, _BROKEN_OFF):
            snapshot_download(name, revision=directory.name, allow_patterns=[glob.escape(file) for file in missing])


def _snapshot(name: str, revision: str | None) -> Path | None:
    """What the cache has of the revision, complete or not; None for nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # with no pattern, for what it means by complete is every file of the repository
        return Path(snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None


def _check_cached(name: str, directory: Path, family: Family, files: Mapping[str, Path]) -> None:
    try:
        if not (directory / INDEX).exists():
            raise MissingError(what_instead(path.name for path in directory.rglob("*")))
        check(directory, family, files)
    except MissingError as error:
        raise ModelError(
            f"--model {name}: {error}. The copy in the local cache is incomplete: run once with network"
        ) from error


@contextmanager
def _faults(name: str, revision: str | None, unreachable: str = _UNREACHABLE) -> Iterator[None]:
    """Says what the hub's refusals mean; `unreachable`, where it answers no more."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # of the client library, whose name differs between releases
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"--model {name}: the repository is gated; accept its licence on the hub and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"--model {name}: no such repository on the hub (or it is private: set HF_TOKEN), nor such a directory"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"--revision {revision}: {name} has no such revision on the hub") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            why = "the hub asks to wait (429 Too Many Requests): try again later, or set HF_TOKEN"
        else:
            why = f"the hub answered {status}; try again later"
        raise ModelError(f"--model {name}: not in the local cache, and {why}") from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the network's
            raise ModelError(f"--model {name}: the hub's cache: {shown(first_line(error))}") from error
        raise ModelError(f"--model {name}: {unreachable}") from error
