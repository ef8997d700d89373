"""A pipeline's two tokenizers, as its model_index.json names them. Torch-free: the planner counts with these, the
engine takes its ids from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxcli.core.errors import ModelError
from fluxcli.models.checkpoints import read_json

# Each is a whole vocabulary. Where none is there, transformers makes an empty one up and says nothing.
_VOCABULARIES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))


class Tokenizers:
    """CLIP (`tokenizer/`) and T5 (`tokenizer_2/`) of a diffusers pipeline directory."""

    def __init__(self, directory: Path) -> None:
        classes = read_json(directory / "model_index.json")
        self._clip = _load(directory, "tokenizer", classes)
        self._t5 = _load(directory, "tokenizer_2", classes)

    def count(self, prompts: Sequence[str]) -> list[int]:
        """T5 tokens of each prompt, uncut, the end token included."""
        if not prompts:
            return []
        return [len(ids) for ids in self._t5(list(prompts), return_attention_mask=False, verbose=False).input_ids]

    def t5(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """T5 ids, cut or padded to `length`."""
        return _padded(self._t5, prompts, length)

    def clip(self, prompts: Sequence[str]) -> list[list[int]]:
        """CLIP ids, cut or padded to the tokenizer's own length (77)."""
        return _padded(self._clip, prompts, self._clip.model_max_length)


def _padded(tokenizer: Any, prompts: Sequence[str], length: int) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_attention_mask=False
    ).input_ids
    return ids


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
