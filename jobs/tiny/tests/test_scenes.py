"""The scenes keep their promises: reproducible, the held-out tenth apart, captions that fit the text buckets."""

import random

import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from jobs.tiny.pipeline import DIRECTORY
from jobs.tiny.scenes import (
    HELD_TRIPLES,
    PALETTE,
    TRIPLES,
    Item,
    Spec,
    caption,
    is_held_out,
    place,
    plain_caption,
    render,
    sample_spec,
)
from jobs.tiny.vocabulary import CAPTION_WORDS


def specs(count: int, seed: int = 0, held_out: bool = False) -> list[Spec]:
    rng = random.Random(seed)
    return [sample_spec(rng, held_out) for _ in range(count)]


def test_same_seed_same_scenes_and_captions() -> None:
    def everything(seed: int) -> list:
        rng = random.Random(seed)
        return [(caption(spec, rng), place(spec, rng)) for spec in specs(50, seed)]

    assert everything(3) == everything(3)
    assert everything(3) != everything(4)


def test_held_out_combinations_never_occur_in_training() -> None:
    assert len(HELD_TRIPLES) == len(TRIPLES) // 10
    assert not any(is_held_out(spec) for spec in specs(500))
    assert all(is_held_out(spec) for spec in specs(100, held_out=True))


def test_a_pair_is_held_out_whichever_way_it_is_told() -> None:
    for spec in specs(300) + specs(300, held_out=True):
        if spec.relation:
            opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[spec.relation]
            assert is_held_out(Spec(spec.background, spec.items[::-1], opposite)) == is_held_out(spec)


def test_plain_captions() -> None:
    assert plain_caption(Spec("blue", (Item("circle", "orange"),))) == "an orange circle on a blue background"
    pair = Spec("white", (Item("star", "red", "small"), Item("ring", "black")), "left")
    assert plain_caption(pair) == "a small red star to the left of a black ring on a white background"


def test_caption_lengths_suit_the_text_buckets() -> None:
    t5 = T5TokenizerFast.from_pretrained(DIRECTORY / "tokenizer_2")
    rng = random.Random(0)
    for style, shortest, longest in (("terse", 3, 40), ("phrase", 3, 40), ("sentence", 3, 40), ("paragraph", 60, 256)):
        lengths = [len(ids) for ids in t5([caption(spec, rng, style) for spec in specs(200)]).input_ids]
        assert shortest <= min(lengths) and max(lengths) <= longest, style
    paragraphs = [caption(spec, rng, "paragraph") for spec in specs(200)]
    assert sum(len(ids) > 64 for ids in t5(paragraphs).input_ids) > 190


def test_every_caption_word_is_one_token_for_both_encoders() -> None:
    t5 = T5TokenizerFast.from_pretrained(DIRECTORY / "tokenizer_2")
    clip = CLIPTokenizer.from_pretrained(DIRECTORY / "tokenizer")
    assert [word for word in CAPTION_WORDS if len(t5.tokenize(word)) != 1 or len(clip.tokenize(word)) != 1] == []


def test_pixels() -> None:
    spec = Spec("yellow", (Item("circle", "blue", "large", "center"),))
    image = (render(torch.tensor([place(spec, random.Random(0))]))[0] * 255).round()
    assert image.shape == (3, 128, 128)
    assert tuple(image[:, 64, 64].int().tolist()) == PALETTE["blue"]
    assert tuple(image[:, 2, 2].int().tolist()) == PALETTE["yellow"]
    soft = (image[2] > PALETTE["yellow"][2] + 5) & (image[2] < PALETTE["blue"][2] - 5)
    assert 50 < soft.sum() < 400  # the outline is anti-aliased, and nothing else is in between
