"""A pipeline's tokenizers: what they need to be there, and that no code comes with them."""

import base64
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from fluxcli.core.errors import ModelError
from fluxcli.models import tokenizers
from fluxcli.models.checkpoints import BUILT_IN
from fluxcli.models.tokenizers import Tokenizers
from tests.models.conftest import edit

PROMPTS = ["a red circle on a white background", 'Ünïcödé 星 🐱, "quoted"  two  spaces', "x", "a dog " * 60]


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


def ids(model: Path) -> list[list[list[int]]]:
    tokenizers = Tokenizers(model)
    return [tokenizers.clip(PROMPTS), tokenizers.t5(PROMPTS, 64), [tokenizers.count(PROMPTS)]]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("tokenizer", "CLIPTokenizerFast"),
        ("tokenizer", "AutoTokenizer"),
        ("tokenizer_2", "T5Tokenizer"),
        ("tokenizer_2", "AutoTokenizer"),
        ("tokenizer_2", "PreTrainedTokenizerFast"),
    ],
)
def test_every_name_of_a_tokenizer_reads_the_same(model: Path, part: str, name: str) -> None:
    edit(model / "model_index.json", **{part: ["transformers", name]})
    assert ids(model) == ids(BUILT_IN / "tiny")


@pytest.mark.parametrize("length", [..., 10**30, 248, None])
def test_clips_length_is_no_more_than_its_encoder_has_positions(model: Path, length: int | None) -> None:
    edit(model / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    assert ids(model) == ids(BUILT_IN / "tiny")


def test_a_tokenizer_needs_no_config(model: Path) -> None:
    for part in ("tokenizer", "tokenizer_2"):
        (model / part / "tokenizer_config.json").unlink()
    assert [len(row) for row in ids(model)[0]] == [77] * len(PROMPTS)


EVIL = "from pathlib import Path\nPath({path!r}).write_text('x')\nclass Evil: pass\n"


@pytest.mark.parametrize("name", ["AutoTokenizer", "PreTrainedTokenizerFast", "T5TokenizerFast"])
def test_a_tokenizer_brings_no_code(model: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, tokenizer = tmp_path / "ran", model / "tokenizer_2"
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    edit(model / "model_index.json", tokenizer_2=["transformers", name])
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit(
        tokenizer / "tokenizer_config.json",
        auto_map=auto_map, tokenizer_class="Evil", trust_remote_code=True, gguf_file="x", name_or_path="a/b",
        init_inputs=["x"], chat_template="{{ x }}", fast_tokenizer_files=["../tokenizer.1.json"], backend="x",
    )  # fmt: skip
    (tokenizer / "config.json").write_text(json.dumps({"auto_map": auto_map, "model_type": "evil"}))
    for place in (tokenizer, model):
        (place / "evil.py").write_text(EVIL.format(path=str(ran)))
    assert ids(model) == ids(BUILT_IN / "tiny")
    assert not ran.exists()
    assert "evil" not in sys.modules


NONE = ("[" * 100_000, "[]", "root:x:0:0", "{}", '{"model": 3}')


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("tokenizer_2/tokenizer.json", content) for content in NONE),
        *(("tokenizer/vocab.json", content) for content in NONE),
        *(("tokenizer_2/tokenizer_config.json", content) for content in NONE[:3]),
    ],
)
def test_a_vocabulary_that_is_none_is_named(model: Path, file: str, content: str) -> None:
    (model / file).write_text(content)
    with pytest.raises(ModelError, match=rf"{Path(file).parent}(/.*)?: ") as refused:
        Tokenizers(model)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("extra", [10**9, -1, "x"])
def test_a_tokenizer_makes_up_no_endless_vocabulary(model: Path, extra: object) -> None:
    edit(model / "tokenizer_2" / "tokenizer_config.json", extra_ids=extra)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: extra_ids must be 0 to 10000"):
        Tokenizers(model)


def test_sentencepieces_file_alone_needs_its_library(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it, transformers makes of FLUX.1's spiece.model the tokenizer that its tokenizer.json is."""
    (model / "tokenizer_2" / "tokenizer.json").unlink()
    (model / "tokenizer_2" / "spiece.model").write_bytes(b"no protobuf")
    monkeypatch.setattr("fluxcli.models.directory.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has spiece\.model alone; to read it: pip install 'fluxcli\[spiece\]'"):
        Tokenizers(model)
    monkeypatch.setattr("fluxcli.models.directory.find_spec", lambda name: True)
    with pytest.raises(ModelError, match=r"tokenizer_2: spiece\.model cannot be read"):
        Tokenizers(model)


def test_sentencepieces_file_alone_gives_the_same_ids(tmp_path: Path) -> None:
    """FLUX.1's own T5 vocabulary, written as the file that older repositories have alone."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = Path(shutil.copytree(BUILT_IN / "flux-dev", tmp_path / "model"))
    path = model / "tokenizer_2" / "tokenizer.json"
    prompts = ["a photo of a Bench, 12 Ünïcödé  and more\twords", "word " * 600, "x"]
    expected = Tokenizers(model).t5(prompts, 64)
    given = json.loads(path.read_text())
    path.unlink()
    made = proto.ModelProto()
    for number, (piece, score) in enumerate(given["model"]["vocab"][:32000]):
        made.pieces.add(piece=piece, score=score, type={0: 3, 1: 3, 2: 2}.get(number, 1))
    trainer, normalizer = made.trainer_spec, made.normalizer_spec
    trainer.model_type, trainer.vocab_size = 1, 32000
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = 0, 1, 2, -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = "<pad>", "</s>", "<unk>"
    normalizer.name, normalizer.add_dummy_prefix, normalizer.escape_whitespaces = "nmt_nfkc", True, True
    normalizer.remove_extra_whitespaces = True
    (charsmap,) = re.findall(r'"precompiled_charsmap": "([^"]*)"', json.dumps(given))
    normalizer.precompiled_charsmap = base64.b64decode(charsmap)
    (path.parent / "spiece.model").write_bytes(made.SerializeToString())
    assert Tokenizers(model).t5(prompts, 64) == expected


DIRECTORIES = [BUILT_IN / "tiny", BUILT_IN / "flux-dev"]
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
