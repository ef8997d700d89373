"""Prompts -> embeddings: the text encoders through transformers, and what they made of the latest prompts."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fluxcli.engine.runtime.graphs import Captured
from fluxcli.engine.weights.fill import load_part
from fluxcli.models.checkpoints import Checkpoint
from fluxcli.models.tokenizers import Tokenizers

if TYPE_CHECKING:
    from fluxcli.engine.runtime.graphs import Pool

# Prompts encoded at once, padded with copies: always as many, so that a prompt's embedding depends on no neighbour and
# on no batch size, and one captured graph serves a text length.
TEXT_BATCH = 4
_CACHE_BYTES = 2**28

Embedding = tuple[Tensor, Tensor]  # txt [L, width], vec [width]


class TextEncoders:
    """T5 (`text_encoder_2`) makes one embedding per token, CLIP (`text_encoder`) one per prompt.

    On CUDA, `capture` records both for a text length as one graph.
    """

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype, visiting: bool = False) -> None:
        """`visiting`: T5's blocks stay in host memory and come to the device one at a time."""
        self._device, self._dtype = device, dtype
        self._tokenizers = Tokenizers(checkpoint.tokenizers)
        self._clip = load_part(checkpoint, "text_encoder", device, dtype)
        self._t5 = load_part(checkpoint, "text_encoder_2", device, dtype, "encoder.block" if visiting else None)
        self._captured: dict[int, Captured[tuple[Tensor, Tensor]]] = {}

    def slots(self) -> dict[str, list[tuple[str, Tensor]]]:
        """(name, values) of every tensor of each part."""
        parts = {"text_encoder": self._clip, "text_encoder_2": self._t5}
        return {
            part: [(name.removeprefix("text_model."), each.data) for name, each in model.named_parameters()]
            for part, model in parts.items()
        }

    def capture(self, length: int, pool: "Pool") -> None:
        if length not in self._captured:
            ids = self._ids(["a prompt"] * TEXT_BATCH, length)
            self._captured[length] = Captured(self.encode, *ids, pool=pool)

    def __call__(self, prompts: Sequence[str], length: int) -> Iterator[tuple[str, Embedding]]:
        """(prompt, (txt [L, width], vec [width])) of each prompt."""
        encode = self._captured.get(length, self.encode)
        for start in range(0, len(prompts), TEXT_BATCH):
            part = list(prompts[start : start + TEXT_BATCH])
            ids = self._ids(part, length)
            txt, vec = encode(*ids)
            yield from zip(part, zip(txt, vec, strict=True), strict=False)  # without the copies

    def encode(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """t5_ids [B, L], clip_ids [B, 77] -> T5's last hidden state [B, L, width], CLIP's pooled output [B, width].

        No attention mask, as in FLUX: padding tokens are part of the text.
        """
        txt = self._t5(input_ids=t5_ids).last_hidden_state
        vec = self._clip(input_ids=clip_ids).pooler_output
        return txt.to(self._dtype), vec.to(self._dtype)

    def _ids(self, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids of TEXT_BATCH prompts, of which the last are copies where there are fewer."""
        rows = self._tokenizers.t5(prompts, length), self._tokenizers.clip(prompts)
        ids = tuple(torch.tensor(each + each[-1:] * (TEXT_BATCH - len(each))) for each in rows)
        if self._device == "cpu":
            return ids[0], ids[1]
        t5, clip = (each.pin_memory().to(self._device, non_blocking=True) for each in ids)
        return t5, clip


class EmbeddingCache:
    """The latest prompts' embeddings, so that a prompt of many images is encoded once."""

    def __init__(self, limit: int = _CACHE_BYTES) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[tuple[str, int], Embedding] = OrderedDict()

    def get(self, prompt: str, length: int) -> Embedding | None:
        found = self._kept.get((prompt, length))
        if found is not None:
            self._kept.move_to_end((prompt, length))
        return found

    def put(self, prompt: str, length: int, embedding: Embedding) -> None:
        self._kept[prompt, length] = embedding
        self._bytes += _bytes(embedding)
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(embedding: Embedding) -> int:
    return sum(each.nbytes for each in embedding)
