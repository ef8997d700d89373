"""What a model of few words was made for, as its fluxcli.json says, and what of a job lies outside: the built-in one
draws plain shapes, and anything else may be an empty picture."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fluxcli.core.config import MAX_STEPS
from fluxcli.core.errors import ModelError
from fluxcli.core.records import Group
from fluxcli.models.checkpoints import Checkpoint
from fluxcli.models.files import read_json

_WORD = re.compile(r"\w+")
_SHOWN, _LONGEST = 5, 24  # words told, and characters of one
_MOST = 1000  # words kept apart


class Scope:
    """Gathers what a model was not made for. Of one that says nothing of itself there is nothing to gather.

    Raises:
        ModelError: fluxcli.json says it in a form that it has not.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        path = checkpoint.directory / "fluxcli.json"
        given: dict[str, Any] = read_json(path) if path.is_file() else {}
        words, steps = given.get("words", ""), given.get("steps", [1, MAX_STEPS])
        if not isinstance(words, str) or [type(each) for each in steps] != [int, int]:
            raise ModelError(f"{path}: words must be a text and steps two numbers")
        own = checkpoint.row_defaults()
        self._name, self._words, self._steps = checkpoint.name, set(words.split()), steps
        self._size = (own.width, own.height)
        self._unknown = Counter[str]()
        self._prompts = 0

    def watching(self, count: Callable[[list[str]], list[int]]) -> Callable[[list[str]], list[int]]:
        """`count`, of whose prompts the words are looked at."""

        def counting(prompts: list[str]) -> list[int]:
            self.look_at(prompts)
            return count(prompts)

        return counting if self._words else count

    def look_at(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            unknown = dict.fromkeys(word for word in _WORD.findall(prompt.lower()) if word not in self._words)
            self._prompts += bool(unknown)
            for word in unknown:
                if word in self._unknown or len(self._unknown) < _MOST:
                    self._unknown[word] += 1

    def lines(self, groups: Iterable[Group]) -> list[str]:
        """What to tell of the prompts looked at and of images of these groups."""
        if not self._words:
            return []
        told, made = [], set(groups)
        if self._unknown:
            named = [word[:_LONGEST] for word, _ in self._unknown.most_common(_SHOWN)]
            more = f" and {len(self._unknown) - _SHOWN} more" if len(self._unknown) > _SHOWN else ""
            count = f" for {self._prompts} prompts" if self._prompts > 1 else ""
            words = f"{'word' if len(self._unknown) == 1 else 'words'} {', '.join(named)}{more}"
            told.append(f"{self._name} does not know the {words}: it may draw an empty picture{count}")
        for width, height in sorted({(group.width, group.height) for group in made} - {self._size})[:1]:
            own = "{}x{}".format(*self._size)
            told.append(f"{self._name} was made for {own}: at {width}x{height} it may not draw what the prompt says")
        least, most = self._steps
        for steps in sorted({group.num_inference_steps for group in made} - {*range(least, most + 1)})[:1]:
            told.append(
                f"{self._name} was tried with {least} to {most} steps: in {steps} it may not draw what the prompt says"
            )
        return told
