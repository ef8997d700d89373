"""PartiPrompts, where they are at hand, taken in with FLUX.1's own tokenizer."""

from collections.abc import Iterator

import numpy as np
import pytest

from fluxcli.core.config import TEXT_LENGTHS, RowDefaults
from fluxcli.job.input.intake import Intake, take_in
from fluxcli.job.input.read import PromptFile
from fluxcli.job.plan import padded_sizes, plan
from fluxcli.models.tokenizers import Tokenizers
from tests import pipelines
from tests.pipelines import DEV, PARTI

pytestmark = pytest.mark.skipif(not pipelines.SHARED.is_dir(), reason="FLUX.1's files are not beside the project")


@pytest.fixture(scope="module")
def parti() -> list[dict[str, str]]:
    return pipelines.partiprompts()


@pytest.fixture(scope="module")
def intake(pipeline) -> Iterator[Intake]:
    """PartiPrompts taken in with the real tokenizer."""
    source = PromptFile(str(PARTI))
    tokenizers = Tokenizers(pipeline(DEV, real=True))
    yield take_in(source, RowDefaults(1024, 1024, 28, 3.5), TEXT_LENGTHS, tokenizers.count)
    source.close()


def test_every_partiprompt_is_a_good_row(intake: Intake, parti: list[dict[str, str]]) -> None:
    assert not intake.failures
    records = intake.records(range(len(intake.groups)))
    assert len(records) == len(parti) == 1632
    assert [record.prompt for record in records] == [row["Prompt"] for row in parti]
    assert [record.meta["Category"] for record in records] == [row["Category"] for row in parti]


def test_the_real_tokenizer_counts_what_is_known_of_partiprompts(intake: Intake) -> None:
    counts = np.array([tokens for tokens, _ in intake.text_tokens()])
    assert (np.median(counts), np.percentile(counts, 95), counts.max()) == (11, 39, 105)


def test_partiprompts_fit_the_two_smallest_buckets(intake: Intake) -> None:
    for tokens, length in intake.text_tokens():
        assert length == (64 if tokens <= 64 else 128)
    assert intake.truncated == 0
    planned = plan(intake.groups, 16, padded_sizes(16))
    assert sorted(row for batch in planned for row in batch.rows) == list(range(1632))
    assert {key.text_length for key in planned.shapes()} == {64, 128}
