"""A pipeline's two tokenizers, as its model_index.json names them. Torch-free: the planner counts with these, the
engine takes its ids from them."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxcli.core.config import MAX_TEXT_LENGTH
from fluxcli.core.errors import ModelError, first_line
from fluxcli.core.family import Family
from fluxcli.models.directory import INDEX, SPIECE, check_vocabulary, class_of
from fluxcli.models.files import MOST_JSON, MOST_VOCABULARY, parse_json, read_bytes, read_json, shown
from fluxcli.models.fingerprint import TOKENIZER_CONFIGS
from fluxcli.models.flux1.family import FLUX1

# What tokenizer_config.json may say. The rest is about chats, about other classes, or about whose code to run.
_SETTINGS = {
    *("add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens"),
    *("bos_token", "clean_up_tokenization_spaces", "cls_token", "do_lower_case", "eos_token", "errors", "extra_ids"),
    *("extra_special_tokens", "legacy", "mask_token", "model_max_length", "model_specific_special_tokens"),
    *("pad_token", "pad_token_id", "padding_side", "sep_token", "split_special_tokens", "truncation_side", "unk_token"),
}
_CLIP_LENGTH = 77
_MOST_EXTRA = 10_000  # tokens that T5's tokenizer adds of itself; it has 100

_LONG = 2**14  # characters beyond which a prompt is cut before it is tokenized


class Tokenizers:
    """CLIP (`tokenizer/`) and T5 (`tokenizer_2/`) of a diffusers pipeline directory."""

    def __init__(self, directory: Path, family: Family = FLUX1) -> None:
        self._clip = _load(directory, "tokenizer", family)
        self._t5 = _load(directory, "tokenizer_2", family)
        # A tokenizer may leave its length out, or have more than the encoder has positions.
        positions = read_json(directory / "text_encoder" / "config.json").get("max_position_embeddings", _CLIP_LENGTH)
        self._clip_length: int = min(self._clip.model_max_length, positions)

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
        """CLIP ids, cut or padded to the encoder's length (77)."""
        return _padded(self._clip, prompts, self._clip_length)


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


def _load(directory: Path, part: str, family: Family) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    index = directory / INDEX
    folder = directory / part
    vocabulary = check_vocabulary(folder)
    # transformers sees a folder with these files alone: none of the model's code, and no key that would fetch some.
    with tempfile.TemporaryDirectory(prefix="fluxcli-tokenizer-") as clean:
        for file in vocabulary:
            (Path(clean) / file).write_bytes(read_bytes(folder / file, MOST_VOCABULARY))
        for file in TOKENIZER_CONFIGS:
            if (folder / file).exists():
                (Path(clean) / file).write_text(json.dumps(_settings(folder / file)), encoding="utf-8")
        cls = getattr(transformers, class_of(index, read_json(index), part, family))
        try:
            return cls.from_pretrained(clean, local_files_only=True, trust_remote_code=False)
        except RecursionError:
            raise ModelError(f"{folder}: the tokenizer cannot be loaded: nested too deeply") from None
        except Exception as error:  # tokenizers, which is Rust, raises the bare class
            if vocabulary == SPIECE:  # transformers goes on to guess at other formats
                raise ModelError(f"{folder}: spiece.model cannot be read") from error
            why = first_line(error)
            raise ModelError(f"{folder}: the tokenizer cannot be loaded: {shown(why)}") from error


def _settings(path: Path) -> dict[str, Any]:
    given = parse_json(read_bytes(path, MOST_JSON), path)
    if path.name != "tokenizer_config.json":
        return given
    extra = given.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= _MOST_EXTRA:
        raise ModelError(f"{path}: extra_ids must be 0 to {_MOST_EXTRA}, got {shown(extra)}")
    return {key: value for key, value in given.items() if key in _SETTINGS}
