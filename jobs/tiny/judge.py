"""Read a picture of plain shapes back by image analysis, and say whether it is what its spec promised.

Knows nothing of the model and draws its own reference shapes, so it judges originals and generated pictures alike.
numpy and pillow only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from jobs.tiny.scenes import Spec

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
_NAMES = list(PALETTE)
_COLOURS = np.array(list(PALETTE.values()), dtype=np.float32)
# Half the distance of the palette's closest pair (yellow, orange): what is nearer to a colour can only mean that one.
TOLERANCE = 40.0
MIN_AREA = 12.0  # pixels; a smaller blot is no object (the smallest shape drawn, a star, covers about 170)
MIN_OVERLAP = 0.8  # of a shape with its ideal outline, intersection over union
ASPECT = {"circle": 1.0, "square": 1.0, "triangle": 2 / 3**0.5, "star": 1.0515, "ring": 1.0}
# Area per squared radius. An object's radius is read from its area, which thin tips and soft edges hardly change.
AREA = {"circle": 3.1416, "square": 3.0976, "triangle": 1.9096, "star": 1.6592, "ring": 2.4178}
# Radii in pixels that divide small from medium from large, for a 128-pixel picture.
SIZE_LIMITS = (14.5, 20.75)


@dataclass(frozen=True)
class Found:
    """One object: what it is (None where unclear), its centre and its radius in pixels, and how well it fits."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    radius: float
    overlap: float

    @property
    def size(self) -> str:
        return "small" if self.radius < SIZE_LIMITS[0] else "medium" if self.radius < SIZE_LIMITS[1] else "large"


@dataclass(frozen=True)
class Reading:
    """All that was found; background is None where it is no colour of the palette."""

    background: str | None
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """Adherence of one picture to one spec; `right` when nothing is wrong. `wrong` names what is."""

    wrong: tuple[str, ...]

    @property
    def right(self) -> bool:
        return not self.wrong


def read(image: Image.Image | np.ndarray) -> Reading:
    """RGB picture (uint8 [128, 128, 3]) -> background and objects."""
    pixels = np.asarray(image, dtype=np.float32)
    frame = np.concatenate(
        [
            pixels[:3].reshape(-1, 3),
            pixels[-3:].reshape(-1, 3),
            pixels[:, :3].reshape(-1, 3),
            pixels[:, -3:].reshape(-1, 3),
        ]
    )
    background = np.median(frame, axis=0)
    labels, count = _components(np.linalg.norm(pixels - background, axis=2) > TOLERANCE)
    objects = (_describe(pixels, background, labels == label) for label in range(1, count + 1))
    return Reading(_colour(background), tuple(found for found in objects if found))


def judge(image: Image.Image | np.ndarray, spec: Spec) -> Verdict:
    """Compare a picture with what its caption promised: background, count, then per object colour, shape, size and
    place where named, and the relation."""
    reading = read(image)
    wrong = [] if reading.background == spec.background else ["background"]
    if len(reading.found) != len(spec.items):
        return Verdict((*wrong, "count"))
    orders = [reading.found] if len(spec.items) == 1 else [reading.found, reading.found[::-1]]
    attempts = [_compare(order, spec) for order in orders]
    return Verdict((*wrong, *min(attempts, key=len)))


def _compare(found: tuple[Found, ...], spec: Spec) -> list[str]:
    wrong = []
    for thing, item in zip(found, spec.items, strict=True):
        wrong += ["colour"] * (thing.colour != item.colour) + ["shape"] * (thing.shape != item.shape)
        wrong += ["size"] * (item.size is not None and thing.size != item.size)
        wrong += ["place"] * (item.place is not None and place_of(thing) != item.place)
    if spec.relation and relation_of(found[0], found[1]) != spec.relation:
        wrong.append("relation")
    return wrong


def place_of(thing: Found, size: int = 128) -> str:
    """The place in the picture's three-by-three grid."""
    column, row = (min(2, int(3 * centre / size)) for centre in (thing.x, thing.y))
    if row == 1:
        return ("left", "center", "right")[column]
    edge = "top" if row == 0 else "bottom"
    return edge if column == 1 else f"{edge} {'left' if column == 0 else 'right'} corner"


def relation_of(first: Found, second: Found) -> str | None:
    """Where the first lies as seen from the second; None where it is too slanted or too close to say."""
    across, down = first.x - second.x, first.y - second.y
    if max(abs(across), abs(down)) < 12 or min(abs(across), abs(down)) > 0.7 * max(abs(across), abs(down)):
        return None
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "above" if down < 0 else "below"


def _colour(value: np.ndarray) -> str | None:
    gaps = np.linalg.norm(_COLOURS - value, axis=1)
    return _NAMES[int(gaps.argmin())] if gaps.min() < TOLERANCE else None


def _describe(pixels: np.ndarray, background: np.ndarray, mask: np.ndarray) -> Found | None:
    """What one connected component is; None where it is too small to be anything."""
    if mask.sum() < MIN_AREA:
        return None
    # Its colour: the median over what differs most from the background, that is over its inside, not its soft edge.
    gap = np.linalg.norm(pixels - background, axis=2) * mask
    colour = np.median(pixels[gap >= 0.9 * np.percentile(gap[mask], 90)], axis=0)
    direction = colour - background
    grown = _grow(mask)
    cover = np.clip((pixels - background) @ direction / (direction @ direction), 0, 1) * grown
    ys, xs = np.nonzero(cover > 0.5)
    if cover.sum() < MIN_AREA or not len(ys):
        return None
    left, right, top, bottom = xs.min(), xs.max() + 1, ys.min(), ys.max() + 1
    width, height = right - left, bottom - top
    best, overlap = None, 0.0
    for shape, aspect in ASPECT.items():
        if abs(np.log(width / height / aspect)) > 0.2:
            continue
        fits = (_overlap(cover, _ideal(shape, width + dw, height + dh), left, top) for dw in (0, 1) for dh in (0, 1))
        fit = max(fits)
        if fit > overlap:
            best, overlap = shape, fit
    radius = float(cover.sum() / AREA[best or "circle"]) ** 0.5
    clear = best if overlap >= MIN_OVERLAP else None
    return Found(clear, _colour(colour), (left + right) / 2, (top + bottom) / 2, radius, overlap)


def _overlap(cover: np.ndarray, ideal: np.ndarray, left: int, top: int) -> float:
    """Intersection over union of soft masks, the ideal one tried at the box's corner and half a pixel before it."""
    best = 0.0
    rows, columns = ideal.shape
    for dy in (-1, 0):
        for dx in (-1, 0):
            y, x = top + dy, left + dx
            if y < 0 or x < 0 or y + rows > cover.shape[0] or x + columns > cover.shape[1]:
                continue
            window = cover[y : y + rows, x : x + columns]
            inside = np.minimum(window, ideal).sum()
            best = max(best, float(inside / (cover.sum() + ideal.sum() - inside)))
    return best


@cache
def _ideal(shape: str, width: int, height: int) -> np.ndarray:
    """Coverage [height, width] of a shape that fills its box, drawn eight times finer and averaged."""
    scale = 8
    w, h = width * scale, height * scale
    picture = Image.new("L", (w, h), 0)
    draw = ImageDraw.Draw(picture)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, w - 1, h - 1), fill=255)
        if shape == "ring":
            draw.ellipse((0.26 * w, 0.26 * h, 0.74 * w - 1, 0.74 * h - 1), fill=0)
    elif shape == "square":
        draw.rectangle((0, 0, w - 1, h - 1), fill=255)
    elif shape == "triangle":
        draw.polygon([(w / 2, 0), (w - 1, h - 1), (0, h - 1)], fill=255)
    else:
        turns = [(1.0 if k % 2 == 0 else 0.45, k * pi / 5) for k in range(10)]
        points = [(reach * sin(angle), -reach * cos(angle)) for reach, angle in turns]
        xs, ys = zip(*points, strict=True)
        across, down = max(xs) - min(xs), max(ys) - min(ys)
        draw.polygon([((x - min(xs)) / across * w, (y - min(ys)) / down * h) for x, y in points], fill=255)
    return np.asarray(picture, dtype=np.float32).reshape(height, scale, width, scale).mean((1, 3)) / 255


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its neighbours within two pixels, to take in the soft edge."""
    for _ in range(2):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """4-connected components: labels (0 where there is none) and how many; joins the runs of neighbouring rows."""
    labels = np.zeros(mask.shape, dtype=np.int32)
    parent = [0]

    def root(label: int) -> int:
        while parent[label] != label:
            label = parent[label]
        return label

    for y, row in enumerate(mask):
        steps = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8)))
        for start, stop in steps.reshape(-1, 2):
            above = {root(label) for label in np.unique(labels[y - 1, start:stop]) if label} if y else set()
            label = min(above, default=len(parent))
            if label == len(parent):
                parent.append(label)
            for other in above:
                parent[other] = label
            labels[y, start:stop] = label
    roots = [root(label) for label in range(len(parent))]
    numbers = {label: number for number, label in enumerate(sorted(set(roots)))}
    return np.array([numbers[label] for label in roots], dtype=np.int32)[labels], len(numbers) - 1
