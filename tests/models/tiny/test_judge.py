"""The judge reads rendered scenes right and says what is wrong with others."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.tiny import judge as judging
from jobs.tiny import scenes
from jobs.tiny.judge import judge, read
from jobs.tiny.scenes import Item, Spec, place, render, sample_spec


def pictures(specs: list[Spec], seed: int = 0) -> np.ndarray:
    rng = random.Random(seed)
    images = render(torch.tensor([place(spec, rng) for spec in specs]))
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def test_the_palettes_agree() -> None:
    assert judging.PALETTE == scenes.PALETTE


@pytest.mark.parametrize("held_out", [False, True])
def test_reads_rendered_scenes(held_out: bool) -> None:
    rng = random.Random(11)
    specs = [sample_spec(rng, held_out) for _ in range(300)]
    right = [judge(picture, spec).right for picture, spec in zip(pictures(specs), specs, strict=True)]
    assert sum(right) >= 0.99 * len(right)


def test_reads_noisy_scenes() -> None:
    rng = random.Random(12)
    specs = [sample_spec(rng) for _ in range(100)]
    noise = np.random.default_rng(0).normal(0, 4, (100, 128, 128, 3))
    noisy = (pictures(specs) + noise).clip(0, 255).astype(np.uint8)
    assert sum(judge(picture, spec).right for picture, spec in zip(noisy, specs, strict=True)) >= 98


LEFT = Spec("white", (Item("circle", "red", "large"), Item("star", "blue", "small")), "left")


@pytest.mark.parametrize(
    ("claimed", "wrong"),
    [
        (replace(LEFT, background="yellow"), {"background"}),
        (replace(LEFT, relation="right"), {"relation"}),
        (replace(LEFT, relation="above"), {"relation"}),
        (replace(LEFT, items=(Item("circle", "red", "medium"), LEFT.items[1])), {"size"}),
        (replace(LEFT, items=(Item("ring", "red", "large"), LEFT.items[1])), {"shape"}),
        (replace(LEFT, items=(Item("circle", "orange", "large"), LEFT.items[1])), {"colour"}),
        (replace(LEFT, items=LEFT.items[:1], relation=None), {"count"}),
        (LEFT, set()),
    ],
)
def test_names_what_is_wrong(claimed: Spec, wrong: set[str]) -> None:
    assert set(judge(pictures([LEFT])[0], claimed).wrong) == wrong


def test_places() -> None:
    for name in scenes.PLACES:
        spec = Spec("black", (Item("square", "white", "medium", name),))
        picture = pictures([spec])[0]
        assert judge(picture, spec).right
        elsewhere = next(other for other in scenes.PLACES if other != name)
        assert judge(picture, Spec("black", (Item("square", "white", "medium", elsewhere),))).wrong == ("place",)


def test_a_blank_or_random_picture_is_wrong() -> None:
    blank = np.full((128, 128, 3), 245, np.uint8)
    assert read(blank).found == ()
    assert judge(blank, LEFT).wrong == ("count",)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert not judge(noise, LEFT).right
