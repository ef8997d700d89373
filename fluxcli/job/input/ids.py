"""The ids of an input's rows, each of which one row may have."""

import re
from array import array
from collections.abc import Sequence

from fluxcli.core.errors import RowError
from fluxcli.job.input.check import Checked, default_id

_BY_NUMBER = re.compile(r"([0-9]{6,20})(?:-(0|[1-9][0-9]*))?")  # an id that a row without one may have


class TakenId(RowError):
    """An earlier row has the id."""


class Ids:
    """The ids of earlier rows: of those without one of their own two bytes each, so that millions need megabytes."""

    def __init__(self, folds_case: bool) -> None:
        self._own: set[str] = set()
        self._copies = array("H")  # by row number: how many images have an id by that number
        self._folded: dict[str, str] | None = {} if folds_case else None

    def add(self, records: Sequence[Checked], number: int, own: bool) -> None:
        """Takes in a row's ids, all or none.

        Raises:
            RowError: one is an earlier row's, or would share its file.
        """
        ids = [record.id for record in records]
        if (own and self._numbered) or not self._own.isdisjoint(ids):
            taken = next((id for id in ids if id in self._own or self._is_number(id)), None)
            if taken is not None:
                raise TakenId(f"id {taken} is already used by an earlier row", id=taken)
        if self._folded is not None:
            self._fold(ids)
        if own:
            self._own.update(ids)
        else:
            self._copies.extend([0] * (number - len(self._copies)))
            self._copies.append(len(ids))

    @property
    def _numbered(self) -> bool:
        return len(self._copies) > 0

    def _is_number(self, id: str) -> bool:
        """Whether it is the id of an earlier row that has none of its own."""
        match = _BY_NUMBER.fullmatch(id)
        number = int(match[1]) if match else len(self._copies)
        if match is None or number >= len(self._copies) or default_id(number) != match[1]:
            return False
        copies = self._copies[number]
        return copies == 1 if match[2] is None else copies > 1 and int(match[2]) < copies

    def _fold(self, ids: Sequence[str]) -> None:
        assert self._folded is not None
        folded = [id.lower() for id in ids]
        for id, name in zip(ids, folded, strict=True):
            if earlier := self._folded.get(name):
                raise RowError(
                    f"id {id} and the earlier {earlier} would be one file here, where names that differ only by case "
                    "are one; give one another id",
                    id=id,
                )
        self._folded.update(zip(folded, ids, strict=True))
