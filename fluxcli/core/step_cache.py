"""The step cache's masks: which steps of an image evaluate the blocks, fixed before a job starts and the same for every
row. Pure arithmetic; how a step without the blocks is made is `engine/step_cache.py`'s matter."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

KEPT = 0.2  # of the steps, the first ones, are always evaluated: MagCache's retention ratio
FEWEST_STEPS = 9  # that a preset is for
REUSED = 0.01  # what a step without the blocks costs of one with them; bench measures it


@dataclass(frozen=True)
class Preset:
    """How much a preset saves.

    Attributes:
        evaluated: share of the steps that evaluate the blocks.
        most_reused: steps in a row that may not.
    """

    evaluated: float
    most_reused: int


# About 1.6, 2.1 and 2.8 times fewer steps; what may be reused in a row is MagCache's choice at such thresholds.
PRESETS = {"fine": Preset(0.61, 2), "balanced": Preset(0.47, 3), "fast": Preset(0.36, 5)}


@dataclass(frozen=True)
class StepCache:
    """What --step-cache means: off, a preset with a model's ratios, or one mask.

    Attributes:
        name: "off", a name of `PRESETS`, or a mask of 0 and 1.
        ratios: of a preset: how much larger what the blocks add is at each step than at the step before, the first 1.
    """

    name: str = "off"
    ratios: tuple[float, ...] = ()

    @property
    def on(self) -> bool:
        return self.name != "off"

    def __str__(self) -> str:
        """What fixes its masks, for job.json."""
        if not self.ratios:
            return self.name
        import hashlib  # for those who have a preset; --help has none

        digest = hashlib.sha256(",".join(map(repr, self.ratios)).encode()).hexdigest()
        return f"{self.name} (ratios {digest[:8]})"

    def refusal(self, steps: int) -> str | None:
        """Why an image cannot have so many steps; None where it can."""
        if self.name in PRESETS and steps < FEWEST_STEPS:
            return f"--step-cache {self.name} needs {FEWEST_STEPS} steps or more: fewer have none to spare; got {steps}"
        if self.on and self.name not in PRESETS and steps != len(self.name):
            return f"--step-cache is a mask of {len(self.name)} steps, and an image with {steps} cannot have it"
        return None

    def mask(self, steps: int) -> str:
        """A 1 for each step that evaluates the blocks, a 0 for each other; nothing where the cache is off."""
        if not self.on:
            return ""
        return _fitted(self.name, self.ratios, steps) if self.name in PRESETS else self.name

    def told(self, steps: int) -> dict[str, Any]:
        """What rows and plans say of an image of so many steps: nothing where the cache is off."""
        mask = self.mask(steps)
        return {"step_cache": mask, "evaluated_steps": mask.count("1")} if mask else {}

    def cost(self, steps: int) -> float:
        """What an image of so many steps costs, in steps that evaluate the blocks."""
        mask = self.mask(steps)
        evaluated = mask.count("1") if mask else steps
        return evaluated + (steps - evaluated) * REUSED


OFF = StepCache()


@lru_cache(maxsize=1024)
def _fitted(preset: str, ratios: tuple[float, ...], steps: int) -> str:
    """The mask of the least threshold that evaluates no more steps than the preset wants; where its most in a row allow
    no such mask, the one that evaluates fewest."""
    wanted, most = round(PRESETS[preset].evaluated * steps), PRESETS[preset].most_reused
    own = interpolated(ratios, steps)
    thresholds = sorted({0.0, *_errors(own, most)})
    least = bisect_left(thresholds, -wanted, key=lambda threshold: -accumulated(own, threshold, most).count("1"))
    return accumulated(own, thresholds[min(least, len(thresholds) - 1)], most)


def accumulated(ratios: Sequence[float], threshold: float, most_reused: int, kept: float = KEPT) -> str:
    """MagCache's rule (Ma et al. 2025), the last step always evaluated: a step is reused while the error that
    accumulates since the last evaluated one, the sum of how far the product of ratios is from 1, stays within
    `threshold`.

    Args:
        ratios: one per step.
        most_reused: steps in a row.
        kept: share of the steps, the first ones, that are always evaluated; the very first is in any case.
    """
    steps, mask = len(ratios), ""
    product, error, reused = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        product *= ratio
        error += abs(1 - product)
        free = max(1, int(kept * steps + 0.5)) <= step < steps - 1
        if free and error <= threshold and reused < most_reused:
            reused += 1
            mask += "0"
        else:
            product, error, reused = 1.0, 0.0, 0
            mask += "1"
    return mask


def interpolated(ratios: Sequence[float], steps: int) -> tuple[float, ...]:
    """Ratios of another number of steps: the logarithm of what the blocks add, linear between the given steps, so that
    all ratios together make as much."""
    if steps == len(ratios):
        return tuple(ratios)
    size = [0.0]
    for ratio in ratios[1:]:
        size.append(size[-1] + math.log(ratio))

    def at(step: int) -> float:
        place = step * (len(size) - 1) / max(1, steps - 1)
        low = min(int(place), len(size) - 2)
        return size[low] + (place - low) * (size[low + 1] - size[low])

    return (1.0, *(math.exp(after - before) for before, after in pairwise(map(at, range(steps)))))


def _errors(ratios: Sequence[float], most: int) -> set[float]:
    """Every error that may have accumulated when a step is looked at: where masks change."""
    found = set()
    for first in range(1, len(ratios)):
        product, error = 1.0, 0.0
        for ratio in ratios[first : first + most]:
            product *= ratio
            error += abs(1 - product)
            found.add(error)
    return found
