"""The types that say what an architecture is: which parts a pipeline of it has, which classes may stand for each, what
sizes it draws. Torch-free, and no more than data: `models/flux1/family.py` is the one there is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

TOKEN_SIDE = 16  # pixels along a side of one image token: 8 of the VAE, 2 of the packing


class Layout(NamedTuple):
    """A way in which files hold a part: its name, and a tensor by which it is known."""

    name: str
    mark: str


@dataclass(frozen=True)
class Part:
    """One part of a pipeline.

    Attributes:
        package: whose class it is, "diffusers" or "transformers".
        classes: the names that model_index.json may give, each with the class of `package` that is made for it. No
            other is ever looked up.
        config: its config file.
        weights: whether it has weight files.
        ignored: a pattern of tensor names that its files may hold and nobody reads.
        layouts: of single files that hold it, the first that fits.
        prefixes: what may stand before its names there.
    """

    package: str
    classes: Mapping[str, str]
    config: str = "config.json"
    weights: bool = True
    ignored: str | None = None
    layouts: tuple[Layout, ...] = ()
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        pipelines: the diffusers classes that model_index.json may name: the first is the one whose images it makes.
        transformer: the defaults of transformer/config.json, which a file may leave out.
        side: pixels along each side of an image where nobody says.
        sides: the least and the most that a side may have.
        token_side: pixels along a side of one image token; a side is a multiple of it.
        guidance: the default guidance scale, where the model takes one.
        steps: denoising steps where nobody says, of a model that takes no guidance scale: it is distilled for few.
        guided_steps: the same, of one that takes it.
    """

    name: str
    pipelines: tuple[str, ...]
    parts: Mapping[str, Part]
    transformer: Mapping[str, object]
    side: int
    sides: tuple[int, int]
    token_side: int
    guidance: float
    steps: int
    guided_steps: int

    def draws(self, side: int) -> bool:
        """Whether an image may have a side of so many pixels."""
        return side % self.token_side == 0 and self.sides[0] <= side <= self.sides[1]
