"""A pipeline's tokenizers: what they need to be there."""

import shutil
import time
from pathlib import Path

import pytest

from fluxcli.core.errors import ModelError
from fluxcli.models import tokenizers
from fluxcli.models.checkpoints import BUILT_IN
from fluxcli.models.tokenizers import Tokenizers
from tests import pipelines


@pytest.mark.parametrize(
    ("part", "gone"), [("tokenizer_2", "tokenizer.json"), ("tokenizer", "merges.txt"), ("tokenizer", "")]
)
def test_a_tokenizer_without_its_vocabulary_is_named(part: str, gone: str, tmp_path: Path) -> None:
    """transformers would make one up, and every picture be of another prompt."""
    model = tmp_path / "model"
    shutil.copytree(BUILT_IN / "tiny", model)
    if gone:
        (model / part / gone).unlink()
    else:
        shutil.rmtree(model / part)
    with pytest.raises(ModelError, match=rf"{part}: holds no vocabulary: tokenizer\.json, or "):
        Tokenizers(model)


DIRECTORIES = [BUILT_IN / "tiny"] + ([pipelines.REAL_DEV] if pipelines.SHARED.is_dir() else [])
LONG = {
    "words": "a photo of a Bench, 12 Ünïcödé 星 and  more\n\twords 🐱 " * 900,
    "one word": "x" * 40_000,
    "unknown to T5": "星空" * 20_000,
    "blanks": "a" + " " * 40_000 + "b " * 300,
    "one word at last": "word " * 3000 + "y" * 30_000,
}


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda each: each.name)
@pytest.mark.parametrize("kind", LONG)
def test_a_long_prompts_ids_are_those_of_the_whole(directory: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut before it is tokenized or after makes no difference to what is kept."""
    both = Tokenizers(directory)
    prompts = [LONG[kind], "short"]
    cut = [both.t5(prompts, 64), both.t5(prompts, 512), both.clip(prompts)]
    counted = both.count(prompts)
    monkeypatch.setattr(tokenizers, "_LONG", 10**9)
    assert cut == [both.t5(prompts, 64), both.t5(prompts, 512), both.clip(prompts)]
    whole = both.count(prompts)
    assert counted[1] == whole[1]
    assert counted[0] <= whole[0]
    assert counted[0] == whole[0] or counted[0] > 2048, "a lower bound, far above any bucket"


def test_megabytes_are_counted_without_being_tokenized_whole() -> None:
    both = Tokenizers(BUILT_IN / "tiny")
    start = time.process_time()
    assert both.count(["x" * 3_000_000, "a word " * 400_000])[0] > 512
    assert time.process_time() - start < 1
