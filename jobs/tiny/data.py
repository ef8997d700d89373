"""The training pool: many scenes as geometry and token ids, made once on all host cores before training starts."""

from __future__ import annotations

import random
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPTokenizer, T5TokenizerFast

from jobs.tiny.scenes import caption, place, sample_spec
from jobs.tiny.vocabulary import CLIP_LENGTH

LONGEST = 256  # T5 tokens of the longest caption kept; longer buckets only add padding
CHUNK = 8192


@dataclass
class Pool:
    """N scenes and their captions."""

    rows: torch.Tensor  # float32 [N, 11], see scenes.place
    t5_ids: torch.Tensor  # int16 [N, LONGEST], padded with 0
    clip_ids: torch.Tensor  # int16 [N, 77]
    lengths: torch.Tensor  # int32 [N]: T5 tokens without padding

    def to(self, device: torch.device) -> Pool:
        return Pool(*(part.to(device) for part in (self.rows, self.t5_ids, self.clip_ids, self.lengths)))


def build_pool(directory: Path, count: int, seed: int, workers: Executor | None, held_out: bool = False) -> Pool:
    """`count` scenes of the training part, or of the held-out one; `directory` holds the tokenizers.

    They are the same for the same seed whoever makes them.
    """
    starts = range(0, count, CHUNK)
    jobs = [(str(directory), f"{seed}/{start}", min(CHUNK, count - start), held_out) for start in starts]
    parts = list((workers.map if workers else map)(_chunk, *zip(*jobs, strict=True)))
    return Pool(*(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))


def _chunk(
    directory: str, seed: str, count: int, held_out: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = random.Random(seed)
    t5 = T5TokenizerFast.from_pretrained(f"{directory}/tokenizer_2")
    clip = CLIPTokenizer.from_pretrained(f"{directory}/tokenizer")
    specs = [sample_spec(rng, held_out) for _ in range(count)]
    rows = np.array([place(spec, rng) for spec in specs], dtype=np.float32)
    prompts = [caption(spec, rng) for spec in specs]
    fixed = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    t5_ids = t5(prompts, max_length=LONGEST, **fixed)["input_ids"].astype(np.int16)
    clip_ids = clip(prompts, max_length=CLIP_LENGTH, **fixed)["input_ids"].astype(np.int16)
    return rows, t5_ids, clip_ids, (t5_ids != 0).sum(1).astype(np.int32)
