"""Which images a job has: its manifest read fast, and, at a start, held against what lies under images/."""

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError, RowError
from fluxcli.core.files import kind_of
from fluxcli.core.records import PromptRecord
from fluxcli.job.output import sound
from fluxcli.job.output.log import RowLog, Tail
from fluxcli.job.output.rows import ID, SHARD, SUFFIX, ManifestRow, check_adapters
from fluxcli.job.output.sink import Entry, FileSink, may_remove, nanoseconds

_STOPS_AT = 3  # altered images that a start names
_MASK = 2**60 - 1  # such numbers take 32 bytes, larger ones 40

# A row as `rows.write` writes it, its settings in the one form that `content` gives them. What a start does not use is
# looked over rather than checked; a row in any other form is parsed instead.
_INTEGER = r"(?:0|[1-9][0-9]{0,18}+)"
_TEXT = r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_PLAIN = r'"[^"\\\x00-\x1f]*+"'  # text that can be written in one way
_SCALE = r"(?:0|[1-9][0-9]{0,8})\.(?:0|[0-9]{0,9}[1-9])"
_FLAT = r"\{[^{}\x00-\x1f]*+\}"
_CANONICAL = re.compile(
    rf'\{{"id": "({ID})", "prompt": ({_TEXT}), "file_name": "(images/(?:{SHARD}/)?)(\1\.{SUFFIX})", '
    r'"sha256": "[0-9a-f]{64}", '
    rf'("seed": {_INTEGER}, "width": {_INTEGER}, "height": {_INTEGER}, "num_inference_steps": {_INTEGER}, '
    rf'"guidance_scale": (?:null|{_SCALE})(?:, "negative_prompt": {_PLAIN}, "true_cfg_scale": {_SCALE})?+)'
    r'(?:, "lora": (\[[^][\x00-\x1f]++\]))?+'
    rf'(?:, "quantization": "fp8")?+(?:, "step_cache": "1[01]*+", "evaluated_steps": {_INTEGER})?+'
    rf', "text_tokens": {_INTEGER}, "text_length": {_INTEGER}, "truncated": (?:true|false)'
    rf', "batch": {_FLAT}(?:, "worker": {_INTEGER})?+, "timing": {_FLAT}, "run": (0|[1-9][0-9]{{0,8}})'
    rf', "finished_at": "([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}T[0-9]{{2}}:[0-9]{{2}}:[0-9]{{2}})\.([0-9]{{3}})Z"'
    rf', "meta": {_FLAT}\}}'
).fullmatch


# What a start needs of a manifest row: id, content (a hash of its settings, good for this process), the folder and the
# name in file_name, finished_at in nanoseconds, run; and its line, for the rest. A bare tuple: there may be millions.
Brief = tuple[str, int, str, str, int, int, bytes]


def briefs(log: "RowLog[ManifestRow]") -> Iterator[tuple[int, Brief | None]]:
    """`RowLog.read` of a manifest, in a third of the time."""
    tail = Tail(log)
    for number, line in log.lines():
        try:
            brief = None if tail.begun else _canonical(line)
        except ValueError:  # no text, or a day that is none: refused when it is parsed
            brief = None
        if brief is not None:
            yield number, brief
        elif b"\0" in line:
            tail.begin(number)
            yield number, None
        else:
            row = log.parse(number, line)
            tail.go_on(row.append)
            folder, slash, name = row.file_name.rpartition("/")
            yield number, (row.id, content(row), folder + slash, name, nanoseconds(row.finished_at), row.run, line)


def _canonical(line: bytes) -> Brief | None:
    found = _CANONICAL(line.decode())
    if found is None:
        return None
    id, prompt, folder, name, settings, lora, run, second, millisecond = found.groups()
    if "\\" in prompt:
        prompt = json.loads(prompt)
        prompt.encode()  # half a surrogate pair is no text
    else:
        prompt = prompt[1:-1]
    finished = _second(second) + int(millisecond) * 10**6
    if lora is not None:
        settings += _told(lora)
    return id, hash(settings + prompt) & _MASK, folder, name, finished, int(run), line


@lru_cache(maxsize=4096)
def _told(lora: str) -> str:
    """The adapters of a row as `content` takes them."""
    value = json.loads(lora)
    if wrong := check_adapters(value):
        raise ValueError(wrong)
    return "".join(_of_adapter(each["sha256"], each["scale"]) for each in value)


def _of_adapter(sha256: str, scale: float) -> str:
    return f" {sha256} {float(scale)!r}"


def content(row: ManifestRow | PromptRecord) -> int:
    """A hash, good for this process, of what an image's pixels depend on besides the job."""
    guidance = "null" if row.guidance_scale is None else repr(float(row.guidance_scale))
    settings = (
        f'"seed": {row.seed}, "width": {row.width}, "height": {row.height}, '
        f'"num_inference_steps": {row.num_inference_steps}, "guidance_scale": {guidance}'
    )
    if row.negative_prompt is not None:
        negative = json.dumps(row.negative_prompt, ensure_ascii=False)
        settings += f', "negative_prompt": {negative}, "true_cfg_scale": {float(row.true_cfg_scale or 1)!r}'
    if isinstance(row, ManifestRow):
        settings += "".join(_of_adapter(each["sha256"], each["scale"]) for each in row.lora or ())
    else:
        settings += "".join(_of_adapter(each.sha256, each.scale) for each in row.adapters)
    return hash(settings + row.prompt) & _MASK


@lru_cache(maxsize=16)
def _second(stamp: str) -> int:
    return nanoseconds(f"{stamp}Z")


@dataclass
class Found:
    """A job's images as a start finds them.

    `images` is each id's content; `lost` are the ids whose images are to be made again, and why. `dropped` are numbers
    of lines that no longer hold, `unreadable` of them a crash's. `strays` are files without a row, by their own names;
    `last_run` is the highest number of a run.
    """

    images: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    unreadable: int = 0
    strays: dict[str, list[str]] = field(default_factory=dict)
    last_run: int = -1

    @property
    def rows(self) -> int:
        return len(self.images) + len(self.lost)

    def told(self) -> str:
        """Why lines are dropped."""
        told = []
        if self.lost:
            shown = ", ".join(f"{id} ({problem})" for id, problem in list(self.lost.items())[:3])
            more = f" and {len(self.lost) - 3} more" if len(self.lost) > 3 else ""
            told.append(f"redoing {len(self.lost)} rows: {shown}{more}")
        if doubled := len(self.dropped) - len(self.lost) - self.unreadable:
            told.append(f"removed {doubled} rows of ids that have another")
        if self.unreadable:
            told.append(f"removed {self.unreadable} lines that a crash left unreadable")
        return "; ".join(told)


def find(log: "RowLog[ManifestRow]", sink: FileSink) -> Found:
    """Takes in each id's first row with a good image and drops all others: what then has none is to be made again.

    Changes nothing but the temporaries that a crash left, which are removed, and the times of images that were copied.

    Raises:
        JobError: a line that is no row; or an image that somebody changed and that is still an image.
    """
    found = Found()
    images, lost, dropped = found.images, found.lost, found.dropped
    folders = _Folders(sink)
    altered: list[str] = []
    for number, brief in briefs(log):
        if brief is None:
            dropped.add(number)
            found.unreadable += 1
            continue
        id, settings, folder, name, finished, run, line = brief
        if run > found.last_run:
            found.last_run = run
        if id in images:
            dropped.add(number)
            continue
        modified = folders[folder].pop(name, None)
        problem = None
        if modified is None:
            problem = folders.instead(folder, name)
        elif modified != finished:
            problem = _examined(log.parse(number, line), sink)
            if problem == _STILL_AN_IMAGE:
                altered.append(folder + name)
                if len(altered) == _STOPS_AT:
                    break
                continue
        if problem is None:
            images[id] = settings
            if lost:
                lost.pop(id, None)
            continue
        dropped.add(number)
        lost.setdefault(id, problem)
    if altered:
        raise JobError(
            f"{log.path.parent}: {', '.join(altered)}: changed since the job made them, and still images; nothing is "
            "overwritten.\nPut back what was there, or let fluxcli verify --repair take them as they are."
        )
    found.strays = folders.strays()
    return found


_STILL_AN_IMAGE = "image altered, and still an image"


def _examined(row: ManifestRow, sink: FileSink) -> str | None:
    """What is wrong with an image whose time is not its row's."""
    try:
        with open(sink.open(row.file_name), "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == row.sha256:  # copied or restored: vouch for it again
                sink.vouch(row.file_name, row.finished_at)
                return None
            file.seek(0)
            sound.size_of(file)
    except sound.Unsound:
        return "image altered"
    return _STILL_AN_IMAGE


class _Folders(dict[str, dict[str, int]]):
    """The images of each folder with their times, a folder read when its first row comes up: the manifest fills one
    after the other, so that only a few are held at a time."""

    def __init__(self, sink: FileSink) -> None:
        super().__init__()
        self._sink = sink
        self._unread = set(sink.folders())
        self._others: dict[str, list[Entry]] = {}

    def __missing__(self, folder: str) -> dict[str, int]:
        images: dict[str, int] = {}
        others: list[Entry] = []
        if folder in self._unread:
            self._unread.discard(folder)
            images, others = self._sink.images(folder)
            for other in others:
                if other.kind == "temporary":
                    self._sink.discard(folder + other.name)
                elif stat.S_ISDIR(other.mode) and may_remove(other.name):
                    place = self._sink.path(folder + other.name)
                    raise JobError(f"{place}: is a directory in an image's place; move it away")
        self[folder], self._others[folder] = images, others
        return images

    def instead(self, folder: str, name: str) -> str:
        """What lies where an image should be."""
        found = (other for other in self._others[folder] if other.name == name)
        return next((f"{kind_of(other.mode)} in its place" for other in found), "no image")

    def strays(self) -> dict[str, list[str]]:
        """Images that were not taken out, by their own names."""
        for folder in sorted(self._unread):
            self[folder]
        found: dict[str, list[str]] = {}
        for folder, images in self.items():
            for name in images:
                found.setdefault(name, []).append(folder + name)
        return found


# Looks from outside, which mend and lock nothing


def read_committed(directory: Path) -> dict[str, int]:
    """Ids in a job's manifest with their `content`."""
    log = RowLog(directory / "manifest.jsonl", ManifestRow)
    return {brief[0]: brief[1] for _, brief in briefs(log) if brief is not None}


def read_prompts(directory: Path) -> Iterator[tuple[str, str]]:
    """(id, prompt) of every image in a job's manifest."""
    for _, row in RowLog(directory / "manifest.jsonl", ManifestRow).read():
        if row is not None:
            yield row.id, row.prompt


def committed_status(committed: dict[str, int]) -> Callable[[PromptRecord], str | None]:
    """Asked of a record: "done" where its image is among `committed`, else None.

    Raises:
        RowError: an image is committed under this id from another prompt or other settings.
    """

    def status(record: PromptRecord) -> str | None:
        known = committed.get(record.id)
        if known is None:
            return None
        if known != content(record):
            raise RowError(
                f"id {record.id} is committed with another prompt or other settings; give the changed row a new id",
                kind="changed_row",
                id=record.id,
            )
        return "done"

    return status


_SETTINGS = ("prompt", "seed", "width", "height", "num_inference_steps", "guidance_scale")


def record_settings(record: PromptRecord) -> dict[str, Any]:
    """The settings of one image, in manifest order: what its pixels depend on besides the job."""
    names = _SETTINGS if record.negative_prompt is None else (*_SETTINGS, "negative_prompt", "true_cfg_scale")
    adapters = [each.as_row() for each in record.adapters]
    return {**{name: getattr(record, name) for name in names}, **({"lora": adapters} if adapters else {})}
