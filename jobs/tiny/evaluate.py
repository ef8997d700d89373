"""Draw unseen prompts with a pipeline and let the judge score them: `python -m jobs.tiny.evaluate [--cases 256]`."""

from __future__ import annotations

import argparse
import json
import random
import textwrap
from collections import Counter
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from PIL import Image, ImageDraw, ImageFont

from jobs.tiny.judge import judge
from jobs.tiny.pipeline import DIRECTORY, SIZE, STEPS
from jobs.tiny.scenes import (
    COLOURS,
    HELD_TRIPLES,
    RELATIONS,
    SHAPES,
    Item,
    Spec,
    caption,
    is_held_out,
    plain_caption,
    sample_spec,
)

KINDS = ("single", "pair", "mixed")


@dataclass(frozen=True)
class Case:
    """A prompt no training caption shares its combination with, the seed of its noise, and what must be seen."""

    spec: Spec
    prompt: str
    seed: int


def cases(kind: str, count: int, seed: int = 0) -> list[Case]:
    """Unseen prompts, seeded.

    single: "a red circle on a blue background", circles, squares and triangles, every held-out combination in turn;
    pair: two objects with a relation on a white background, plain form; mixed: everything, in all phrasings.
    """
    rng = random.Random(f"{kind} {seed}")
    if kind == "single":
        looks = sorted(look for look in HELD_TRIPLES if look[0] in ("circle", "square", "triangle"))
        specs = [Spec(b, (Item(s, c),)) for s, c, b in (looks[i % len(looks)] for i in range(count))]
    elif kind == "pair":
        specs = [_unseen_pair(rng) for _ in range(count)]
    else:
        specs = [sample_spec(rng, held_out=True) for _ in range(count)]
    prompts = [caption(spec, rng) if kind == "mixed" else plain_caption(spec) for spec in specs]
    return [Case(spec, prompt, rng.randrange(2**31)) for spec, prompt in zip(specs, prompts, strict=True)]


def _unseen_pair(rng: random.Random) -> Spec:
    colours = [colour for colour in COLOURS if colour != "white"]
    while True:
        first, second = (Item(rng.choice(SHAPES), rng.choice(colours)) for _ in range(2))
        spec = Spec("white", (first, second), rng.choice(RELATIONS))
        if first != second and is_held_out(spec):
            return spec


def draw(
    pipeline: FluxPipeline, wanted: list[Case], text_length: int | None = None, steps: int = STEPS, batch: int = 8
) -> list[Image.Image]:
    """One picture a case; `text_length` None: the smallest of 64, 128, 256 and 512 that holds the batch's prompts."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        prompts = [case.prompt for case in part]
        longest = max(len(ids) for ids in pipeline.tokenizer_2(prompts).input_ids)
        length = text_length or next((bucket for bucket in (64, 128, 256) if bucket >= longest), 512)
        generators = [torch.Generator("cpu").manual_seed(case.seed) for case in part]
        pictures += pipeline(
            prompts,
            width=SIZE,
            height=SIZE,
            num_inference_steps=steps,
            max_sequence_length=length,
            generator=generators,
        ).images
    return pictures


def score(pictures: list[Image.Image], wanted: list[Case], workers: Executor | None = None) -> dict:
    """The share that is right, and how often what was wrong."""
    verdicts = list((workers.map if workers else map)(judge, pictures, [case.spec for case in wanted]))
    wrong = Counter(what for verdict in verdicts for what in set(verdict.wrong))
    return {"right": sum(v.right for v in verdicts) / len(verdicts), "of": len(verdicts), "wrong": dict(wrong)}


def contact_sheet(
    pictures: list[Image.Image], prompts: list[str] | None = None, columns: int = 8, gap: int = 6
) -> Image.Image:
    """Images in rows, each over the whole of its prompt where there are any."""
    font = ImageFont.load_default(11)
    texts = ["\n".join(textwrap.wrap(prompt, 22)) for prompt in prompts or []]
    below = 14 * max((text.count("\n") + 1 for text in texts), default=0)
    rows = -(-len(pictures) // columns)
    width, height = SIZE + gap, SIZE + gap + below
    sheet = Image.new(
        "RGB", (columns * width + gap, rows * height + gap), (200, 200, 200) if texts else (120, 120, 120)
    )
    brush = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        x, y = gap + number % columns * width, gap + number // columns * height
        sheet.paste(picture, (x, y))
        if texts:
            brush.multiline_text((x, y + SIZE), texts[number], (0, 0, 0), font, spacing=2)
    return sheet


def sheet_cases() -> list[Case]:
    """64 unseen prompts for a person to look at, none of them a paragraph: 16 single, 24 pairs, 24 of any kind."""
    short = [case for case in cases("mixed", 64, 1) if len(case.prompt) <= 90]
    return [*cases("single", 16, 1), *cases("pair", 24, 1), *short[:24]]


def quiet() -> None:
    """No remarks of the libraries: long captions are cut for CLIP, as FLUX does, and each would be told."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY)
    parser.add_argument("--cases", type=int, default=256, help="prompts of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--text-lengths", default="auto", help='comma-separated; "auto" is the smallest that fits')
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of 64 unseen prompts here")
    arguments = parser.parse_args()

    quiet()
    pipeline = FluxPipeline.from_pretrained(arguments.directory, dtype=getattr(torch, arguments.dtype))
    render = partial(draw, pipeline, steps=arguments.steps, batch=arguments.batch_size)
    for kind in filter(None, arguments.kinds.split(",")):
        wanted = cases(kind, arguments.cases, arguments.seed)
        for length in arguments.text_lengths.split(","):
            pictures = render(wanted, text_length=None if length == "auto" else int(length))
            print(json.dumps({"kind": kind, "text_length": length, **score(pictures, wanted)}), flush=True)
    if arguments.sheet:
        wanted = sheet_cases()
        pictures = render(wanted)
        sheet = contact_sheet(pictures, [case.prompt for case in wanted])
        sheet.quantize(128).save(arguments.sheet, optimize=True)
        print(json.dumps({"sheet": str(arguments.sheet), **score(pictures, wanted)}), flush=True)


if __name__ == "__main__":
    main()
