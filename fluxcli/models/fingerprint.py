"""A short digest of what a model's images come from, cheap enough for every start: nothing large is read whole."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from fluxcli.core.errors import ModelError
from fluxcli.core.family import Family, Part
from fluxcli.models.directory import VOCABULARIES
from fluxcli.models.files import MOST_JSON, MOST_VOCABULARY, open_regular, read_bytes
from fluxcli.models.headers import Header
from fluxcli.models.single_files import weights_in
from fluxcli.models.weight_files import weight_files

VERSION = "2:"  # begins a fingerprint of the kind made here; the first kind had no such mark
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SAMPLE = 1024  # bytes from each end of a tensor; twice as many from its middle
_LEGACY_SAMPLE = 2**16
_CHUNK = 2**20


def fingerprint(directory: Path, family: Family, files: Mapping[str, Path], random: bool) -> str:
    """Changes when the images may: with every config and tokenizer file that is read, and of each weight file that is
    read with its size, its header (names, shapes, dtypes) and bytes from the beginning, the middle and the end of every
    tensor. So a LoRA merged in place into a few layers is seen, and a file that nobody reads is not; nor is the name of
    a single file of `files`.

    Raises:
        ModelError: a file is not there or not what it should be.
    """
    digest = hashlib.sha256(b"random" if random else b"")
    try:
        _take_all(digest, directory, family, files, random)
    except OSError as error:
        raise ModelError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error
    return VERSION + digest.hexdigest()[:32]


def _take_all(
    digest: "hashlib._Hash", directory: Path, family: Family, files: Mapping[str, Path], random: bool
) -> None:
    for name, part in family.parts.items():
        for path in _configs(directory / name, part, random):
            data = read_bytes(path, MOST_VOCABULARY if path.name in sum(VOCABULARIES, ()) else MOST_JSON)
            digest.update(f"\0{name}/{path.name}\0{len(data)}\0".encode() + data)
        if part.weights and not random:
            for path, header in weights_in(directory, name, part, files).heads():
                digest.update(f"\0{name}/{'' if name in files else path.name}\0".encode())
                for sample in _samples(path, header):
                    digest.update(sample)


def _configs(directory: Path, part: Part, random: bool) -> Iterator[Path]:
    if part.config not in TOKENIZER_CONFIGS:
        yield directory / part.config
        return
    if random:  # borrowed from another model
        return
    vocabularies = sorted({file for files in VOCABULARIES for file in files})
    yield from (path for path in (directory / file for file in (*TOKENIZER_CONFIGS, *vocabularies)) if path.exists())


def _samples(path: Path, header: Header) -> Iterator[bytes]:
    yield f"{header.size}\0".encode()
    yield header.raw
    with open_regular(path) as file:
        for entry in header.entries:
            length = entry.end - entry.start
            pieces = [(entry.start, length)]
            if length > 4 * _SAMPLE:
                middle = entry.start + length // 2 - _SAMPLE
                pieces = [(entry.start, _SAMPLE), (middle, 2 * _SAMPLE), (entry.end - _SAMPLE, _SAMPLE)]
            for start, size in pieces:
                file.seek(start)
                yield file.read(size)


def legacy_fingerprint(directory: Path, family: Family, random: bool) -> str:
    """The first kind, which job directories of the time hold: every file of the parts' folders, whole unless it is a
    weight file, and of that the header and 64 KiB of both ends."""
    digest = hashlib.sha256(b"random" if random else b"")
    parts = [name for name, part in family.parts.items() if not (random and part.config in TOKENIZER_CONFIGS)]
    for path in sorted(path for part in parts for path in (directory / part).glob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"\0{path.relative_to(directory).as_posix()}\0{size}\0".encode())
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                _take(digest, file, 8 + length)
                _take(digest, file, _LEGACY_SAMPLE)
                file.seek(max(file.tell(), size - _LEGACY_SAMPLE))
            _take(digest, file, size)
    for name, part in family.parts.items():
        # A version of that time read the single file beside an index: other weights than those that are read now.
        single = directory / name / "diffusion_pytorch_model.safetensors"
        if not random and part.weights and single.is_file():
            read = [path for path, _ in weight_files(directory / name, part.package)]
            digest.update(b"" if single in read else b"\0index first")
    return digest.hexdigest()[:32]


def _take(digest: "hashlib._Hash", file: IO[bytes], length: int) -> None:
    while length > 0 and (part := file.read(min(length, _CHUNK))):
        digest.update(part)
        length -= len(part)
