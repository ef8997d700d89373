"""job.json: what a job is, written once, and told apart from every other job."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxcli.core.errors import JobError
from fluxcli.core.files import open_regular, replacing
from fluxcli.job.output.rows import BadRow, read_object, shown

_LARGEST = 2**20  # bytes


@dataclass(frozen=True)
class Identity:
    """What fixes the pixels of a whole job: the model, as {"name", "revision", "fingerprint"}, and the options.

    `rest` is what else job.json says.
    """

    model: dict[str, Any]
    options: dict[str, Any]
    rest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Identity":
        """Raises BadRow: what is wrong with it."""
        rest = dict(values)
        model, options = rest.pop("model", None), rest.pop("options", None)
        for name, value in (("model", model), ("options", options)):
            if not isinstance(value, dict):
                raise BadRow(f"{name} must be an object, not {shown(value)}")
        for name in ("name", "fingerprint"):
            if not isinstance(model.get(name), str):
                raise BadRow(f"model.{name} must be text, not {shown(model.get(name))}")
        if not isinstance(model.get("revision"), str | None):
            raise BadRow(f"model.revision must be text or null, not {shown(model['revision'])}")
        for name, value in options.items():
            if not all(isinstance(one, _SCALAR) for one in (value if isinstance(value, list) else [value])):
                raise BadRow(f"options.{shown(name)} must be a plain value, not {shown(value)}")
        return cls(model, options, rest)

    def differences(self, now: "Identity") -> list[str]:
        """Each option that is another now, in words."""
        before, after = self.told(), now.told()
        return [
            f"--{name.replace('_', '-')} was {before.get(name, (None, 'None'))[1]}, "
            f"now {after.get(name, (None, 'None'))[1]}"
            for name in sorted(before.keys() | after.keys())
            if before.get(name, (None,))[0] != after.get(name, (None,))[0]
        ]

    def told(self) -> dict[str, tuple[Any, str]]:
        """The model and each option by name: what is compared of it, and how it is shown."""
        model = self.model
        at = f" at {_plain(model['revision'])}" if model.get("revision") else ""
        name = f"{_plain(model['name'])}{at} (weights {_plain(model['fingerprint'][:8])})"
        told: dict[str, tuple[Any, str]] = {"model": ((model["fingerprint"], model.get("revision")), name)}
        for option, value in {**_UNSAID, **self.options}.items():
            told[_plain(option)] = value, ",".join(map(_plain, value)) if isinstance(value, list) else _plain(value)
        return told


# Options that job.json leaves out, with the value that they have then.
_UNSAID = {
    "quantization": "none", "step_cache": "off", "lora": "none", "negative_prompt": None, "true_cfg_scale": 1.0,
}  # fmt: skip
_SCALAR = (str, int, float, type(None))


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else shown(value)


def read_identity(directory: Path) -> Identity | None:
    """A directory's job.json, or None where there is none.

    Raises:
        JobError: it is no such file.
    """
    path = directory / "job.json"
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        data = file.read(_LARGEST + 1)
    try:
        if len(data) > _LARGEST:
            raise BadRow("is too large")
        return Identity.of(read_object(data))
    except BadRow as error:
        raise JobError(f"{path}: is not a fluxcli job file ({error}); choose another -o") from error


def write_identity(directory: Path, identity: dict[str, Any]) -> None:
    with replacing(directory / "job.json") as file:
        file.write(f"{json.dumps(identity, indent=2, ensure_ascii=False)}\n".encode())


def check_identity(directory: Path, identity: dict[str, Any]) -> None:
    """Refuses a directory that holds another job, with every difference spelled out.

    Raises:
        JobError: the differences by option name.
    """
    known = read_identity(directory)
    differences = known.differences(Identity.of(identity)) if known else []
    if differences:
        raise JobError(
            f"{directory} holds a job with other settings: {'; '.join(differences)}\n"
            "Use the same settings to go on, another -o, or --force to start over in a new directory."
        )
