"""Text for people. What is from elsewhere is made safe for a terminal: a prompt, a file's or a column's name may hold
codes that move the cursor, change the title or turn the line around."""

import json
import re
from typing import Any

# C0 (line ends and tabs aside), DEL, C1 with CSI, marks and overrides of direction, line separators, and halves of
# surrogate pairs, which no encoding takes.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with each character that a terminal would obey as \uXXXX; within JSON text that is the same string."""
    return _UNSAFE.sub(_escaped, text)


def printable_line(text: str) -> str:
    """As `printable`, and line ends and tabs too: for text of a user's within a line of ours."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def show(value: Any) -> str:
    """A value for a message: as JSON, short."""
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 60 else text[:57] + "..."


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 image", "2 images"; `many` where no s makes it."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"
