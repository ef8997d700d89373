"""Nothing that a terminal obeys reaches it from a user's text."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxcli.core.files import json_line
from fluxcli.core.terminal import counted, printable, printable_line

BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@given(st.text(st.characters(codec=None)))
def test_no_control_or_direction_code_is_left(text: str) -> None:
    for char in printable(text):
        assert char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(char) not in BIDI
    printable(text).encode()
    assert not set(printable_line(text)) & set("\n\r\t")


@pytest.mark.parametrize("text", ["Ünïcödé 星", "👩\u200d🚀 family", "two\nlines\tand a tab", "a\u00a0b"])
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_a_code_is_shown_by_its_number() -> None:
    assert printable("\x1b[31m \x9b2J \u202e") == r"\u001b[31m \u009b2J \u202e"


@given(st.text(st.characters(codec="utf-8")))
def test_rows_of_json_hold_no_codes_and_lose_nothing(text: str) -> None:
    line = json_line({"prompt": text})
    assert json.loads(line) == {"prompt": text}
    assert line.count(b"\n") == 1
    assert printable(line.decode()) == line.decode()


def test_one_is_singular_and_nought_is_not() -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(number, "batch", "batches") for number in (1, 2)] == ["1 batch", "2 batches"]
