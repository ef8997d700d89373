"""FLUX.1's own tokenizers, where they are at hand."""

import pytest

from fluxcli.models.tokenizers import Tokenizers
from tests import pipelines
from tests.pipelines import DEV

pytestmark = pytest.mark.skipif(not pipelines.SHARED.is_dir(), reason="FLUX.1's files are not beside the project")


def test_the_real_tokenizers_pad_and_cut_as_diffusers_does(pipeline) -> None:
    from transformers import AutoTokenizer

    directory = pipeline(DEV, real=True)
    tokenizers = Tokenizers(directory)
    prompts = ["a bench", "Ünïcödé 星 🐱", "word " * 600]
    for part, length, ours in (
        ("tokenizer_2", 64, tokenizers.t5(prompts, 64)),
        ("tokenizer_2", 512, tokenizers.t5(prompts, 512)),
        ("tokenizer", 77, tokenizers.clip(prompts)),
    ):
        theirs = AutoTokenizer.from_pretrained(directory / part)
        assert ours == theirs(prompts, padding="max_length", max_length=length, truncation=True).input_ids
