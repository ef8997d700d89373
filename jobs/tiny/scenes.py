"""Seeded scenes of one or two plain shapes: what they hold (`Spec`), where it lies, their captions and their pixels.

A `Spec` is what a caption promises and what the judge checks. `place` turns it into geometry, `render` into pixels:
both only add what the caption leaves open. Unnamed sizes are medium and unnamed places near the middle, so that a
short prompt has one natural picture.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from functools import cache

import torch

SIZE = 128  # pixels a side; all lengths below are in these pixels
SHAPES = ("circle", "square", "triangle", "star", "ring")
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "yellow": (240, 220, 40),
    "purple": (140, 60, 180),
    "orange": (240, 140, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
COLOURS = tuple(PALETTE)
RADII = {"small": (11.0, 13.0), "medium": (16.0, 18.5), "large": (23.0, 26.0)}
PLACES = {
    "top left corner": (32, 32),
    "top": (64, 32),
    "top right corner": (96, 32),
    "left": (32, 64),
    "center": (64, 64),
    "right": (96, 64),
    "bottom left corner": (32, 96),
    "bottom": (64, 96),
    "bottom right corner": (96, 96),
}
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Item:
    """One object as a caption names it; `size` and `place` are None where it does not."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Spec:
    """One or two items on a background; `relation` says where the first lies as seen from the second."""

    background: str
    items: tuple[Item, ...]
    relation: str | None = None


# --- the held-out tenth -------------------------------------------------------------------------------------------

TRIPLES = tuple((s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if b != c)
HELD_TRIPLES = frozenset(random.Random("held-out triples").sample(TRIPLES, len(TRIPLES) // 10))


def is_held_out(spec: Spec) -> bool:
    """Whether training must never see this combination.

    Held out are a seeded tenth of all (shape, colour, background), alone and in pairs, and of all pairs of
    (shape, colour) with their relation or places and background: "A left of B" counts as "B right of A".
    """
    if any((item.shape, item.colour, spec.background) in HELD_TRIPLES for item in spec.items):
        return True
    return len(spec.items) == 2 and zlib.crc32(_pair_key(spec).encode()) % 10 == 0


def _pair_key(spec: Spec) -> str:
    first, second = spec.items
    relation = spec.relation
    if relation in ("right", "below"):
        first, second, relation = second, first, OPPOSITE[relation]
    names = [f"{item.colour} {item.shape} {item.place}" for item in (first, second)]
    return " | ".join([*(names if relation else sorted(names)), str(relation), spec.background])


# --- specs --------------------------------------------------------------------------------------------------------


def sample_spec(rng: random.Random, held_out: bool = False) -> Spec:
    """A random spec from the training part, or from the held-out part."""
    while True:
        spec = _sample_any(rng)
        if is_held_out(spec) == held_out:
            return spec


def _sample_any(rng: random.Random) -> Spec:
    kind = rng.choices(("single", "relation", "places"), (0.35, 0.5, 0.15))[0]
    background = "white" if kind != "single" and rng.random() < 0.25 else rng.choice(COLOURS)
    colours = [colour for colour in COLOURS if colour != background]
    sized = rng.random() < 0.5

    def size() -> str | None:
        return rng.choice(tuple(RADII)) if sized and rng.random() < 0.8 else None

    if kind == "single":
        place = rng.choice(tuple(PLACES)) if rng.random() < 0.5 else None
        return Spec(background, (Item(rng.choice(SHAPES), rng.choice(colours), size(), place),))
    while True:
        looks = [(rng.choice(SHAPES), rng.choice(colours)) for _ in range(2)]
        if looks[0] != looks[1]:
            break
    if kind == "relation":
        items = tuple(Item(shape, colour, size()) for shape, colour in looks)
        return Spec(background, items, rng.choice(RELATIONS))
    places = rng.choice(PLACE_PAIRS)
    return Spec(background, tuple(Item(*look, size(), place) for look, place in zip(looks, places, strict=True)))


PLACE_PAIRS = tuple(
    (a, b)
    for a in PLACES
    for b in PLACES
    if max(abs(PLACES[a][0] - PLACES[b][0]), abs(PLACES[a][1] - PLACES[b][1])) >= 64
)


# --- geometry -----------------------------------------------------------------------------------------------------


def place(spec: Spec, rng: random.Random) -> list[list[float]]:
    """Geometry of a spec: background index, then per object [shape index, colour index, x, y, radius]; flat, 11 long.

    A missing second object has shape index -1. Objects never touch each other or the border.
    """
    row: list[float] = [COLOURS.index(spec.background)]
    for number, item in enumerate(spec.items):
        radius = rng.uniform(*RADII[item.size or "medium"])
        if item.place:
            x, y = (centre + rng.uniform(-2, 2) for centre in PLACES[item.place])
        elif spec.relation:
            along = 64 + (-31 if (spec.relation in ("left", "above")) == (number == 0) else 31) + rng.uniform(-2, 2)
            across = 64 + rng.uniform(-5, 5)
            x, y = (along, across) if spec.relation in ("left", "right") else (across, along)
        else:
            x, y = 64 + rng.uniform(-5, 5), 64 + rng.uniform(-5, 5)
        row += [SHAPES.index(item.shape), COLOURS.index(item.colour), x, y, radius]
    return row + [-1.0, 0.0, 0.0, 0.0, 1.0] * (2 - len(spec.items))


# --- pixels -------------------------------------------------------------------------------------------------------


def distance(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to a shape of radius `r` about the origin, y pointing down; all broadcast together.

    Near its outline each is exact but for the mitred outside of sharp corners, which is all that anti-aliasing needs.
    """
    norm = torch.sqrt(x * x + y * y + 1e-6)
    circle = norm - r
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * r
    half_width, height = 1.05 * r, 1.05 * 3**0.5 * r
    slope = (x.abs() * height - (y + height / 2) * half_width) / torch.sqrt(height**2 + half_width**2)
    triangle = torch.maximum(y - height / 2, slope)
    # A star's outline in one tenth of the circle is one line, from the tip (1, 0) to the notch; fold the plane there.
    tip, notch_x, notch_y = 1.12 * r, 0.45 * 1.12 * 0.80902 * r, 0.45 * 1.12 * 0.58779 * r
    angle = torch.atan2(x, -y)
    folded = (angle - 1.2566371 * torch.round(angle / 1.2566371)).abs()
    along, away = norm * torch.cos(folded) - tip, norm * torch.sin(folded)
    star = (along * notch_y + away * (tip - notch_x)) / torch.sqrt(notch_y**2 + (tip - notch_x) ** 2)
    ring = (norm - 0.74 * r).abs() - 0.26 * r
    away_from_all = torch.full_like(circle, 1e3)
    result = away_from_all
    for index, candidate in enumerate((circle, square, triangle, star, ring)):
        result = torch.where(shape == index, candidate, result)
    return result


@cache
def _palette(device: torch.device) -> torch.Tensor:
    """float32 [8, 3] in 0..1; kept, since a CUDA graph cannot capture a copy from the host."""
    return torch.tensor(list(PALETTE.values()), dtype=torch.float32, device=device) / 255


def render(rows: torch.Tensor) -> torch.Tensor:
    """Rows of `place` [N, 11] -> anti-aliased images [N, 3, 128, 128] in 0..1, on the rows' device."""
    palette = _palette(rows.device)
    centres = torch.arange(SIZE, device=rows.device, dtype=torch.float32) + 0.5
    image = palette[rows[:, 0].long()][:, :, None, None].expand(-1, -1, SIZE, SIZE)
    for start in (1, 6):
        shape, colour, x, y, radius = rows[:, start : start + 5].float().unbind(1)
        column = (slice(None), None, None)
        gap = distance(
            shape[column], centres[None, None, :] - x[column], centres[None, :, None] - y[column], radius[column]
        )
        cover = (0.5 - gap).clamp(0, 1)[:, None]
        image = image + cover * (palette[colour.long()][:, :, None, None] - image)
    return image


# --- captions -----------------------------------------------------------------------------------------------------

SIZE_WORDS = {
    "small": ("small", "small", "small", "little", "tiny"),
    "medium": ("medium", "medium", "medium sized"),
    "large": ("large", "large", "large", "big", "huge"),
}
PLACE_WORDS = {
    **{
        f"{row} {side} corner": (
            f"in the {row} {side} corner",
            f"in the {row} {side} corner",
            f"in the {row} {side}",
            f"{row} {side}",
            f"at the {row} {side}",
            f"in the {other} {side} corner",
        )
        for row, other in (("top", "upper"), ("bottom", "lower"))
        for side in ("left", "right")
    },
    "top": ("at the top", "at the top", "at the top center", "near the top edge"),
    "bottom": ("at the bottom", "at the bottom", "at the bottom center", "near the bottom edge"),
    "left": ("on the left", "on the left side", "at the left edge", "on the left"),
    "right": ("on the right", "on the right side", "at the right edge", "on the right"),
    "center": ("in the center", "in the center", "in the middle", "at the center"),
}
RELATION_WORDS = {
    "left": ("to the left of", "to the left of", "left of", "on the left of"),
    "right": ("to the right of", "to the right of", "right of", "on the right of"),
    "above": ("above", "above", "directly above", "over"),
    "below": ("below", "below", "directly below", "under"),
}
THEN_WORDS = {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"}
FILLERS = (
    "This is a simple flat illustration.",
    "The drawing is clean and geometric, with crisp edges.",
    "There is no text, no frame and no shadow anywhere in the picture.",
    "Nothing else is to be seen.",
    "The style is minimal, like a page in a book for children.",
    "Every color is solid and uniform, without any texture or gradient.",
    "The light is even and there are no outlines.",
    "It would make a good poster or a simple icon.",
    "The whole composition is quiet and very easy to read.",
    "The viewer looks at it straight from the front.",
    "Please keep the picture plain, with smooth and sharp edges.",
    "The rest of the canvas is empty.",
    "I want it to look like work made by a graphic artist who likes simple things.",
    "All in all it is a calm picture, and that is just what we want here.",
)


def caption(spec: Spec, rng: random.Random, style: str | None = None) -> str:
    """A caption of a spec; `style` is "terse", "phrase", "sentence" or "paragraph", random if None."""
    style = style or rng.choices(("terse", "phrase", "sentence", "paragraph"), (0.2, 0.45, 0.22, 0.13))[0]
    text = {"terse": _terse, "phrase": _phrase, "sentence": _sentence, "paragraph": _paragraph}[style](spec, rng)
    return text if rng.random() < 0.5 else text[0].upper() + text[1:]


def caption_words() -> set[str]:
    """Every word that captions are made of, in small letters."""
    rng = random.Random(0)
    captions = (caption(sample_spec(rng), rng) for _ in range(30_000))
    return {word for text in captions for word in re.findall(r"\w+", text.lower())}


def plain_caption(spec: Spec) -> str:
    """The one plain form, as in "a red circle to the left of a blue square on a white background"."""
    names = []
    for item in spec.items:
        where = f" {PLACE_WORDS[item.place][0]}" if item.place else ""
        names.append(_a(" ".join(filter(None, (item.size, item.colour, item.shape)))) + where)
    joint = f" {RELATION_WORDS[spec.relation][0]} " if spec.relation else " and "
    return f"{joint.join(names)} on {_a(spec.background)} background"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name(item: Item, rng: random.Random, terse: bool = False) -> str:
    """An item without its place; terse: without an article."""
    size = rng.choice(SIZE_WORDS[item.size]) if item.size else ""
    if terse or rng.random() < 0.88:
        words = " ".join(filter(None, (size, item.colour, item.shape)))
        return words if terse else _a(words)
    return f"{_a(f'{size} {item.shape}'.strip())} {rng.choice(('in', 'that is'))} {item.colour}"


def _located(item: Item, rng: random.Random, terse: bool = False) -> str:
    name = _name(item, rng, terse)
    return f"{name} {rng.choice(PLACE_WORDS[item.place])}" if item.place else name


def _body(spec: Spec, rng: random.Random, terse: bool = False) -> str:
    """The items with their places or relation, without the background."""
    if len(spec.items) == 1:
        return _located(spec.items[0], rng, terse)
    if not spec.relation:
        return (", " if terse else " and ").join(_located(item, rng, terse) for item in spec.items)
    first, second = (_name(item, rng, terse) for item in spec.items)
    if not terse and rng.random() < 0.2:
        return f"{first} with {second} {THEN_WORDS[OPPOSITE[spec.relation]]}"
    return f"{first} {rng.choice(RELATION_WORDS[spec.relation])} {second}"


def _terse(spec: Spec, rng: random.Random) -> str:
    body, background = _body(spec, rng, terse=True), spec.background
    default = "black" if any(item.colour == "white" for item in spec.items) else "white"
    if background == default and rng.random() < 0.2:
        return body if rng.random() < 0.5 else _body(spec, rng)  # a caption may leave out the usual background
    forms = (f"{body}, {background} background", f"{body} on {background}", f"{background} background, {body}")
    return rng.choices(forms, (3, 1, 1))[0]


def _phrase(spec: Spec, rng: random.Random) -> str:
    background = _a(f"{rng.choice(('', '', '', 'plain ', 'solid '))}{spec.background} background")
    if len(spec.items) == 1 and spec.items[0].place and rng.random() < 0.3:
        name, where = _name(spec.items[0], rng), rng.choice(PLACE_WORDS[spec.items[0].place])
        return f"{name} on {background}, {where}"
    return f"{_body(spec, rng)} on {background}"


def _sentence(spec: Spec, rng: random.Random) -> str:
    body, colour = _body(spec, rng), spec.background
    return rng.choice(
        (
            f"There is {body} on {_a(colour)} background.",
            f"Draw {body} on {_a(colour)} background.",
            f"A picture of {body} on {_a(colour)} background.",
            f"The background is {colour}. There is {body}.",
            f"On {_a(colour)} background, {body}.",
            f"{_a(colour)} background with {body}.",
            f"{body}; the background is plain {colour}.",
            f"{body}, and everything else is {colour}.",
        )
    )


def _paragraph(spec: Spec, rng: random.Random) -> str:
    """Several sentences, 65 to about 250 T5 tokens: the facts in order among remarks that change nothing."""
    facts = [
        rng.choice(
            (
                "The background is plain {}.",
                "A uniform {} fills the whole background.",
                "Behind it all is a solid {} background.",
            )
        ).format(spec.background)
    ]
    body = _body(spec, rng)
    facts.insert(rng.randint(0, 1), rng.choice((f"The picture shows {body}.", f"We see {body}.", f"There is {body}.")))
    if rng.random() < 0.5:
        number = "two objects" if len(spec.items) == 2 else "one object"
        facts.append(f"There {'are' if len(spec.items) == 2 else 'is'} only {number} in the scene.")
    fillers = rng.sample(FILLERS, rng.randint(5, len(FILLERS)))
    slots = sorted(rng.sample(range(len(fillers) + len(facts)), len(facts)))
    remaining, told = iter(fillers), dict(zip(slots, facts, strict=True))
    return " ".join(told[i] if i in told else next(remaining) for i in range(len(fillers) + len(facts)))
