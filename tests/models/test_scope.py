"""What a model of few words was made for."""

import json
from pathlib import Path

import pytest

from fluxcli.core.errors import ModelError
from fluxcli.core.records import Group
from fluxcli.models.checkpoints import Checkpoint, resolve
from fluxcli.models.scope import Scope
from tests.cli.conftest import copy_of

OWN = Group(128, 128, 64, 10)


def lines(*prompts: str, groups: tuple[Group, ...] = (OWN,), model: str = "tiny") -> list[str]:
    scope = Scope(resolve(model))
    counted = scope.watching(lambda prompts: [len(prompt) for prompt in prompts])([*prompts])
    assert counted == [len(prompt) for prompt in prompts]
    return scope.lines(groups)


def test_what_it_was_made_for_is_no_remark() -> None:
    assert lines("A red circle, above a BLUE square.", "an orange star on a white background") == []


def test_words_it_does_not_know_are_told() -> None:
    assert lines("a photo of a cat") == ["tiny does not know the words photo, cat: it may draw an empty picture"]
    (line,) = lines("a cat", "a red circle", "ein Bär sitzt da, und " + "x" * 100 + " too")
    assert line.startswith("tiny does not know the words cat, ein, b\u00e4r, sitzt, da and 3 more: ")
    assert line.endswith("empty picture for 2 prompts")


@pytest.mark.parametrize(
    ("group", "told"),
    [
        (OWN._replace(width=64), "tiny was made for 128x128: at 64x128 it may not draw what the prompt says"),
        (
            OWN._replace(num_inference_steps=2),
            "tiny was tried with 4 to 28 steps: in 2 it may not draw what the prompt says",
        ),
    ],
)
def test_a_size_or_a_number_of_steps_it_was_not_made_for_is_told(group: Group, told: str) -> None:
    assert lines("a red circle", groups=(OWN, group, group)) == [told]
    assert lines("a red circle", groups=(OWN._replace(num_inference_steps=28),)) == []


def test_other_models_say_nothing_of_themselves() -> None:
    assert lines("a photo of a cat", groups=(Group(512, 512, 64, 1),), model="random:flux-dev") == []


@pytest.mark.parametrize("given", [{"words": ["a"]}, {"words": "a", "steps": [4]}, {"words": "a", "steps": [4, "x"]}])
def test_a_model_that_says_it_otherwise_is_refused(given: dict, tmp_path: Path) -> None:
    directory = copy_of(Path(resolve("tiny").directory), tmp_path / "model")
    (directory / "fluxcli.json").write_text(json.dumps(given))
    with pytest.raises(ModelError, match=r"fluxcli.json: words must be a text and steps two numbers"):
        Scope(Checkpoint("other", directory))
