"""A pipeline's tokenizers: what they need to be there."""

import shutil
from pathlib import Path

import pytest

from fluxcli.core.errors import ModelError
from fluxcli.models.checkpoints import BUILT_IN
from fluxcli.models.tokenizers import Tokenizers


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
