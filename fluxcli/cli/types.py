"""What the command line's options take, checked and named in their own errors."""

import math
from typing import Any

import click

from fluxcli.core.config import MOST_IMAGES


class Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
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


class Side(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "PIXELS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            side = int(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a number of pixels", param, ctx)
        if side % 16 or not 64 <= side <= 4096:
            self.fail(f"must be a multiple of 16 from 64 to 4096, got {side}", param, ctx)
        return side


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        width, x, height = str(value).lower().partition("x")
        if not x:
            self.fail(f"{value!r} is not a size like 1024x768", param, ctx)
        return Side().convert(width, param, ctx), Side().convert(height, param, ctx)


class Device(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "auto|cuda|cuda:N|cpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, index = str(value).partition(":")
        if kind not in ("auto", "cuda", "cpu") or (colon and (kind != "cuda" or not index.isdecimal())):
            self.fail(f"{value!r} is none of auto, cuda, cuda:N and cpu", param, ctx)
        return str(value)


class BatchSize(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        size = int(value) if str(value).isdecimal() else 0
        if not 1 <= size <= MOST_IMAGES:
            self.fail(f"{value!r} is neither 1 to {MOST_IMAGES} nor auto", param, ctx)
        return size


class Finite(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number
