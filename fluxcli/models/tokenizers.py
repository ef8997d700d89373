"""A pipeline's two tokenizers, as its model_index.json names them. Torch-free: the planner counts with these, the
engine takes its ids from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxcli.core.config import MAX_TEXT_LENGTH
from fluxcli.core.errors import ModelError
from fluxcli.models.checkpoints import read_json

# Each is a whole vocabulary. Where none is there, transformers makes an empty one up and says nothing.
_VOCABULARIES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))

_LONG = 2**14  # characters beyond which a prompt is cut before it is tokenized


class Tokenizers:
    """CLIP (`tokenizer/`) and T5 (`tokenizer_2/`) of a diffusers pipeline directory."""

    def __init__(self, directory: Path) -> None:
        classes = read_json(directory / "model_index.json")
        self._clip = _load(directory, "tokenizer", classes)
        self._t5 = _load(directory, "tokenizer_2", classes)

    def count(self, prompts: Sequence[str]) -> list[int]:
        """T5 tokens of each prompt, uncut, the end token included; of one far longer than any bucket, a lower bound."""
        if not prompts:
            return []
        if any(len(prompt) > _LONG for prompt in prompts):
            prompts = [_beginning(self._t5, prompt, 4 * MAX_TEXT_LENGTH, anywhere=True) for prompt in prompts]
        return _counts(self._t5, prompts)

    def t5(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """T5 ids, cut or padded to `length`."""
        return _padded(self._t5, prompts, length)

    def clip(self, prompts: Sequence[str]) -> list[list[int]]:
        """CLIP ids, cut or padded to the tokenizer's own length (77)."""
        return _padded(self._clip, prompts, self._clip.model_max_length)


def _padded(tokenizer: Any, prompts: Sequence[str], length: int) -> list[list[int]]:
    if any(len(prompt) > _LONG for prompt in prompts):
        prompts = [_beginning(tokenizer, prompt, length) for prompt in prompts]
    ids: list[list[int]] = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_attention_mask=False
    ).input_ids
    return ids


def _counts(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(list(prompts), return_attention_mask=False, verbose=False).input_ids]


def _beginning(tokenizer: Any, prompt: str, tokens: int, anywhere: bool = False) -> str:
    """A beginning of a long prompt with more than `tokens` tokens, else all of it: tokenizing megabytes to keep the
    first 512 tokens would take seconds.

    It ends before a blank, at which both kinds of tokenizer cut a text into words before they look at each: so its
    tokens are those that the whole prompt begins with. Or `anywhere`, where only their number matters.
    """
    end = _LONG
    while end < len(prompt):
        cut = prompt.rfind(" ", 0, end)
        if cut < 0 and anywhere:
            cut = end
        if cut > 0 and _counts(tokenizer, [prompt[:cut]])[0] > tokens + 1:
            return prompt[:cut]
        end *= 4
    return prompt


def _load(directory: Path, part: str, classes: dict[str, Any]) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    library, name = classes.get(part, (None, None))
    if library != "transformers" or not hasattr(transformers, str(name)):
        raise ModelError(f"{directory / 'model_index.json'}: {part} must be a tokenizer of transformers, got {name}")
    if not any(all((directory / part / file).is_file() for file in files) for files in _VOCABULARIES):
        wanted = ", or ".join(" and ".join(files) for files in _VOCABULARIES)
        raise ModelError(f"{directory / part}: holds no vocabulary: {wanted}")
    try:
        return getattr(transformers, name).from_pretrained(directory / part, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{directory / part}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
