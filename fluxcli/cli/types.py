"""What the command line's options take, checked and named in their own errors."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxcli.core.config import MOST_IMAGES
from fluxcli.models.flux1.family import FLUX1

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_DEMO = Path(__file__).parents[1] / "demo.jsonl"
_MODELS = (
    *("tiny", "random:flux-dev", "random:flux-schnell"),
    *("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
)
_GPUS = "/proc/driver/nvidia/gpus"  # of this machine: torch, which knows too, takes seconds to ask


class _Type(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Its name is shown as it is: what may be typed in small letters, what stands for something in large ones."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name

    def completed(self, incomplete: str, *values: str) -> "list[CompletionItem]":
        """Those of the values that may be meant, for a shell."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(value) for value in values if value.startswith(incomplete)]


class Whole(click.IntRange):
    """A whole number. Its help tells a range that a user may run into, and no other."""

    def _describe_range(self) -> str:
        return f"{self.min} to {self.max}" if self.max is not None and self.max < 2**32 else ""


class Local(click.Path):
    """A path of this machine; an address is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(f"{value} is an address; fluxcli reads and writes files of this machine only", param, ctx)
        return super().convert(value, param, ctx)


class InputFile(Local):
    """Rows: a file, - for standard input, or demo for those that come with fluxcli."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, allow_dash=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "demo" and (not os.path.exists(value) or os.path.isdir(value)):
            value = str(_DEMO)
        return super().convert(value, param, ctx)


class Model(_Type):
    name = "MODEL"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        """The models that have names, else files."""
        from click.shell_completion import CompletionItem

        return self.completed(incomplete, *_MODELS) or [CompletionItem(incomplete, type="file")]


class Numbers(_Type):
    """A list like 64,128: each number once, in order."""

    name = "N,N,..."

    def __init__(self, what: str, most: int) -> None:
        self._what, self._most = what, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            numbers = sorted({int(str(part).strip()) for part in parts})
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 64,128,256,512", param, ctx)
        if not numbers or numbers[0] < 1 or numbers[-1] > self._most:
            self.fail(f"{self._what} must be 1 to {self._most}, got {value}", param, ctx)
        return tuple(numbers)


class Side(_Type):
    name = "PIXELS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            side = int(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number of pixels", param, ctx)
        if not FLUX1.draws(side):
            least, most = FLUX1.sides
            self.fail(f"must be a multiple of {FLUX1.token_side} from {least} to {most}, got {side}", param, ctx)
        return side


class Size(_Type):
    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, x, height = str(value).lower().partition("x")
        if not x:
            self.fail(f"{value!r} is not a size like 1024x768", param, ctx)
        return Side().convert(width, param, ctx), Side().convert(height, param, ctx)


class Device(_Type):
    name = "auto|cuda|cuda:N|cpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        device = str(value).lower()
        kind, colon, index = device.partition(":")
        if kind not in ("auto", "cuda", "cpu") or (colon and (kind != "cuda" or not index.isdecimal())):
            self.fail(f"{value!r} is none of auto, cuda, cuda:N and cpu", param, ctx)
        return device

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        gpus = len(os.listdir(_GPUS)) if os.path.isdir(_GPUS) else 0
        return self.completed(incomplete, "auto", "cpu", "cuda", *(f"cuda:{index}" for index in range(gpus)))


class Gpus(_Type):
    """ "all", how many, or which."""

    name = "all|N|N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int | list[int]:
        listed = isinstance(value, list | tuple)
        parts = [str(part).strip() for part in (value if listed else str(value).split(","))]
        if [part.lower() for part in parts] == ["all"]:
            return "all"
        if not parts or not all(part.isdecimal() and part.isascii() and len(part) < 6 for part in parts):
            self.fail(f"{value!r} is neither all, a number of GPUs, nor a list of them like 0,2,5", param, ctx)
        gpus = [int(part) for part in parts]
        if len(gpus) == 1 and not listed:
            if not gpus[0]:
                self.fail("0 GPUs make no image; for GPU 0 alone say 1", param, ctx)
            return gpus[0]
        twice = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
        if twice is not None:
            self.fail(f"GPU {twice} is named twice", param, ctx)
        return gpus


class BatchSize(_Type):
    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if str(value).lower() == "auto":
            return "auto"
        size = int(value) if str(value).isdecimal() else 0
        if not 1 <= size <= MOST_IMAGES:
            self.fail(f"{value!r} is neither 1 to {MOST_IMAGES} nor auto", param, ctx)
        return size


class Lora(_Type):
    """An adapter's path and scale. What follows the last = is the scale, where the whole is no file."""

    name = "PATH[=SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        path, scale = str(value), 1.0
        if "=" in path and not os.path.exists(path):
            path, _, number = path.rpartition("=")
            scale = Finite().convert(number, param, ctx)
        if not os.path.isfile(os.path.expanduser(path)):  # told before a model is downloaded
            self.fail(f"{path}: no such file", param, ctx)
        return path, scale


class Finite(_Type):
    name = "NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number
