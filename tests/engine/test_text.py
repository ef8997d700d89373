"""A prompt is encoded once, and its embedding depends on nothing but itself and its text length."""

from collections import Counter

import torch

from fluxcli.core.records import Batch, PromptRecord, ShapeKey
from fluxcli.engine.engine import Engine
from fluxcli.engine.runtime.device import resolve as resolve_device
from fluxcli.engine.text import EmbeddingCache
from fluxcli.models.checkpoints import resolve


def engine() -> Engine:
    return Engine(resolve("tiny"), resolve_device("cpu", "float32", None, "auto"))


def counted(made: Engine) -> Counter[tuple[str, int]]:
    """How often each prompt is encoded from now on, by text length."""
    encode, counts = made._text, Counter()

    def counting(prompts, length):
        counts.update((prompt, length) for prompt in prompts)
        return encode(prompts, length)

    made._text = counting
    return counts


def batch(index: int, prompts: list[str], length: int = 64) -> Batch:
    records = [
        PromptRecord(str(i), prompt, i, 64, 64, 1, 3.5, i + 1, text_length=length) for i, prompt in enumerate(prompts)
    ]
    return Batch(index, ShapeKey(len(prompts), 64, 64, length), 1, records)


def test_each_prompt_is_encoded_once_per_text_length() -> None:
    made = engine()
    counts = counted(made)
    for index, prompts in enumerate((["a", "a", "b"], ["b", "c", "a"], ["c", "d"])):
        made.submit(batch(index, prompts)).result()
    made.submit(batch(9, ["a"], length=128)).result()
    assert counts == {("a", 64): 1, ("b", 64): 1, ("c", 64): 1, ("d", 64): 1, ("a", 128): 1}


def test_neighbours_batch_sizes_and_what_was_cached_change_nothing() -> None:
    made = engine()
    alone = made._encode(ShapeKey(1, 64, 64, 64), ["a red circle"])
    made._embeddings = EmbeddingCache()
    crowd = made._encode(ShapeKey(7, 64, 64, 64), [*"uvwxy", "a red circle", "z"])
    again = made._encode(ShapeKey(2, 64, 64, 64), ["a red circle", "new"])
    for one, other, third in zip(alone, crowd, again, strict=True):
        assert torch.equal(one[0], other[5]) and torch.equal(one[0], third[0])


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    embedding = (torch.zeros(4, 8), torch.zeros(8))
    cache = EmbeddingCache(limit=2 * sum(each.nbytes for each in embedding))
    cache.put("a", 4, embedding)
    cache.put("b", 4, embedding)
    assert cache.get("a", 4) is not None
    cache.put("c", 4, embedding)
    assert cache.get("b", 4) is None and cache.get("a", 4) is not None and cache.get("a", 8) is None


def test_a_prompt_is_tokenized_once_however_many_copies_pad_its_batch(monkeypatch) -> None:
    made = engine()
    tokenized: list[list[str]] = []
    t5 = made._text._tokenizers.t5
    monkeypatch.setattr(
        made._text._tokenizers, "t5", lambda prompts, length: tokenized.append(list(prompts)) or t5(prompts, length)
    )
    assert [prompt for prompt, _ in made._text(["a", "b"], 64)] == ["a", "b"]
    assert tokenized == [["a", "b"]]
