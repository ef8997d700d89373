"""Rows without ids are known by their number, so a row added above another gives it another's image and seed. That is
noticed here: the same prompts under other numbers than those they were made under."""

import re
from array import array
from collections.abc import Iterable

from fluxcli.core.errors import InputError
from fluxcli.job.input.check import Checked, default_id

_DEFAULT = re.compile(r"([0-9]{6,})(?:-[0-9]+)?")


class Moved:
    """The rows without ids whose number is committed with another prompt, and from the first of them on those that are
    to be made: a few numbers each."""

    def __init__(self) -> None:
        self._changed = array("q")
        self._index, self._line, self._prompt = array("q"), array("q"), array("q")

    @property
    def changed(self) -> int:
        """Rows seen that have changed."""
        return len(self._changed)

    def look_at(self, record: Checked, index: int, changed: bool) -> None:
        """Takes in the first image of a row that is to be made, or may not be as it has `changed`."""
        if changed or self._changed:
            match = _DEFAULT.fullmatch(record.id)
            if match and match[1] == default_id(index):
                if changed:
                    self._changed.append(index)
                self._index.append(index)
                self._line.append(record.line)
                self._prompt.append(hash(record.prompt))

    def check(self, name: str, committed: Iterable[tuple[str, str]], rows: int | None) -> None:
        """Refuses an input whose rows have moved.

        Args:
            committed: (id, prompt) of every image that is made.
            rows: in the input; None where it was not read to its end.

        Raises:
            InputError: a row's prompt was made under a number that another row has now, or none.
        """
        if not self._changed:
            return
        places = {prompt: place for place, prompt in enumerate(self._prompt)}
        changed = set(self._changed)
        found: dict[int, int] = {}  # place -> the number it was made under
        for id, prompt in committed:
            place = places.get(hash(prompt))
            match = None if place is None else _DEFAULT.fullmatch(id)
            if place is None or match is None:
                continue
            before = int(match[1])
            if before != self._index[place] and (before in changed or (rows is not None and before >= rows)):
                found.setdefault(place, before)
        if found:
            place, before = next(iter(found.items()))
            raise InputError(
                f"{name}: rows without ids have moved: line {self._line[place]} was made as {default_id(before)} and "
                f"would be {default_id(self._index[place])} now ({len(found)} rows or more). Nothing is made twice.\n"
                "Put new rows at the end, give all rows ids (--id-column), or choose another -o."
            )
