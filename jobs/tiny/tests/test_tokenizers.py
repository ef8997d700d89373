"""The built-in tokenizers take any Unicode text, and the committed files are what the script writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, T5TokenizerFast

from jobs.tiny.pipeline import DIRECTORY
from jobs.tiny.vocabulary import write_clip_tokenizer, write_t5_tokenizer

T5 = T5TokenizerFast.from_pretrained(DIRECTORY / "tokenizer_2")
CLIP = CLIPTokenizer.from_pretrained(DIRECTORY / "tokenizer")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_tokenizes(text: str) -> None:
    ids = T5(text).input_ids
    assert ids[-1] == T5.eos_token_id == 1 and T5.pad_token_id == 0
    assert T5.unk_token_id not in ids[:-1]
    padded = CLIP(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert len(padded) == 77 and padded[0] == CLIP.bos_token_id and CLIP.eos_token_id in padded


def test_no_character_is_unknown_to_t5() -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 4096):
        assert T5.unk_token_id not in T5(" ".join(characters[start : start + 4096])).input_ids


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A Red CIRCLE", "a red circle"),
        ("a “red” circle…", 'a "red" circle...'),
        ("a\tred\n circle", "a red circle"),
    ],
)
def test_folding(one: str, other: str) -> None:
    assert T5(one).input_ids == T5(other).input_ids


def test_different_scripts_stay_different() -> None:
    texts = ["é", "è", "привет", "пока", "日本", "😀", "🦊", "مرحبا"]
    assert len({tuple(T5(text).input_ids) for text in texts}) == len(texts)
    assert len({tuple(CLIP(text).input_ids) for text in texts}) == len(texts)


def test_the_script_writes_the_committed_files(tmp_path) -> None:
    write_clip_tokenizer(tmp_path / "tokenizer")
    write_t5_tokenizer(tmp_path / "tokenizer_2")
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*") if path.is_file())
    assert len(written) == 5
    for path in written:
        assert (tmp_path / path).read_bytes() == (DIRECTORY / path).read_bytes(), path
