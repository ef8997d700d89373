"""The two tokenizers of the built-in model, made from word lists: small, and total over Unicode.

CLIP: byte-level BPE, so every text is spelled exactly. T5: a unigram model whose normalizer folds ASCII letters to
lower case and spells every character outside the vocabulary by its UTF-8 bytes. transformers rebuilds a T5 tokenizer
from `tokenizer.json` keeping only its vocabulary, post-processor and precompiled charsmap, so the spelling must live
in that charsmap: a double-array trie from UTF-8 prefixes to their replacements.
"""

from __future__ import annotations

import base64
import json
import string
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors


def _words(text: str) -> list[str]:
    return text.split()


# What captions are made of (see scenes.py): each of these is one token in both tokenizers.
CAPTION_WORDS = _words("""
a an the is are of in on at to and with this that there it its for from by as no not any only one two other first
second plain flat simple clean clear solid single background picture image scene drawing illustration shape shapes
color colored object objects side corner edge edges center middle top bottom left right upper lower above below
next beside over under between draw show shows showing seen see drawn placed sits lies stands located
circle square triangle star ring small medium large little big sized size tiny huge
red green blue yellow purple orange black white
everything else empty nothing canvas whole entire behind fills filled covers covered uniform smooth sharp crisp bright
dark light soft text words shadow shadows outline texture border frame gradient pattern view viewer seems looks like
simply just very quite rather also while where which here them they both each all more than same style design
minimal graphic poster icon book children geometric composition work artist made using
please create make want would be can you i we
""")

# Everyday English, so that other prompts are not spelled letter by letter.
COMMON_WORDS = _words("""
about after again air am animal another arms art asks away baby back ball bare bark be beach bear beautiful because bed
been before being bench best bicycle bird board boat body book bottle bowl box boy bread bridge bring building bus but
cake call came camera car card castle cat chair child city cloud coat coffee come computer could country couple cup cut
day deep desk did different dog door down dragon dress drink each ear eat eight end eye face family far fast feet few
field film find fire fish five floor flower fly food forest four friend fruit full garden girl give glass go gold good
got grass gray great ground had hair half hand hang has hat have he head heart her high hill him his hold home horse
hot house how human if ice inside into island keep kid kind king kitchen know lake lamp land last leaf leg letter life
line lion live long look lot love low machine man many map may me men metal mirror moon morning most mountain mouse
move much music my name near neck new night now ocean off old open or our out outside own page paint painting panda
paper park part people person photo photograph piece pink pizza plane plant plate play point portrait pot put queen
rain read real ride river road robot rock room round run sand sat saw say school sea set seven she ship shirt shoe
short sign sit sitting six sky sleep snow so some song space stand standing statue stone stop street sun sunset
surrounded table tail take tall ten their then these thing think three through time together too towel tower town train
tree truck turn up us use vase view walk wall war warm was watch water wave way wearing well were what wheel when
window wine wing winter woman women wood wooden world write yellow yes young your zebra zero
""")

SUFFIXES = _words("s es ed er ers est ing ion ions ly y al ic ive able ment ness ful less th st nd rd re un de en")
BIGRAMS = _words("""
he in er an re on at nd st es en of te ed or ti hi as to ar ou is it nt se ha al ng ro ne le ri ll ea ra ce li ch om be
sh ma us ca el la ho ta ec di et no il ur pe so wh lo po ge mo ss ac ai ad tr ut un am ee ul mi si fo ol op id ow ke oo
ck ap ag av ab ay ig im ir iv ot ov pl pr qu sa sc sp su tu ty ve vi wa we wi ye th ght tion
""")

T5_PAD, T5_EOS, T5_UNK = "<pad>", "</s>", "<unk>"
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77
CLIP_VOCABULARY = 1280


def byte_symbol(byte: int) -> str:
    """The vocabulary's stand-in for one UTF-8 byte: a letter no normalized text contains otherwise."""
    return chr(0x100 + byte)


def charsmap_rules() -> dict[bytes, str]:
    """UTF-8 prefix -> replacement of a character that starts with it; no key is a prefix of another.

    Two-byte characters (Latin, Greek, Cyrillic, Hebrew, Arabic) are spelled exactly. Longer ones are spelled by
    their first two bytes, that is by their block, except where typography and emoji live; CLIP sees them exactly.
    """
    rules: dict[bytes, str] = {bytes([code]): " " for code in [*range(1, 32), 127]}
    rules |= {letter.encode(): letter.lower() for letter in string.ascii_uppercase}
    for lead in range(0xC2, 0xE0):
        for second in range(0x80, 0xC0):
            rules[bytes([lead, second])] = byte_symbol(lead) + byte_symbol(second)
    wide = {b"\xe2\x80", b"\xe3\x80", b"\xf0\x9f"}
    for lead in range(0xE0, 0xF5):
        for second in range(0x80, 0xC0):
            prefix = bytes([lead, second])
            spelled = byte_symbol(lead) + byte_symbol(second)
            if prefix in wide:
                rules |= {prefix + bytes([third]): spelled + byte_symbol(third) for third in range(0x80, 0xC0)}
            else:
                rules[prefix] = spelled
    plain = {"\u00a0": " ", "\u0085": " ", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}
    plain |= {"\u2013": "-", "\u2014": "-", "\u2026": "...", "\u3000": " "}
    plain |= {chr(code): " " for code in [*range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F]}
    return rules | {character.encode(): text for character, text in plain.items()}


def precompiled_charsmap(rules: dict[bytes, str]) -> bytes:
    """SentencePiece's form: u32 size, a double-array trie of u32 units, then NUL-terminated replacements.

    A unit holds its label in bits 0..7, "has a value" in bit 8 and its offset from bit 10; a node's children lie at
    `position ^ offset ^ label`, its value (bit 31 set) at `position ^ offset`.
    """
    texts, starts = bytearray(), {}
    for text in sorted(set(rules.values())):
        starts[text] = len(texts)
        texts += text.encode() + b"\0"

    children: dict[bytes, set[int]] = {}
    for key in rules:
        for depth in range(len(key)):
            children.setdefault(key[:depth], set()).add(key[depth])

    units: dict[int, int] = {0: 0}
    position = {b"": 0}
    first_free = 1
    for node in sorted({*children, *rules}, key=lambda key: (len(key), key)):
        labels = sorted(children.get(node, set())) if node not in rules else [0]
        base = first_free
        while any(base ^ label in units for label in labels):
            base += 1
        here = position[node]
        units[here] |= (here ^ base) << 10 | (node in rules) << 8
        for label in labels:
            units[base ^ label] = 1 << 31 | starts[rules[node]] if node in rules else label
            if node not in rules:
                position[node + bytes([label])] = base ^ label
        while first_free in units:
            first_free += 1
    size = (max(units) // 256 + 1) * 256  # a lookup may touch any cell of the last block
    trie = struct.pack(f"<{size}I", *(units.get(index, 0) for index in range(size)))
    return struct.pack("<I", len(trie)) + trie + bytes(texts)


def t5_vocabulary() -> list[tuple[str, float]]:
    """Pieces with scores: whole words first; equal scores make the fewest pieces win."""
    pieces = [T5_PAD, T5_EOS, T5_UNK, "▁", "\0"]
    pieces += [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces += [byte_symbol(byte) for byte in range(0x80, 0xF5) if byte not in (0xC0, 0xC1)]
    pieces += [f"▁{word}" for word in [*CAPTION_WORDS, *COMMON_WORDS]]
    pieces += [f"▁{letter}" for letter in string.ascii_lowercase] + BIGRAMS + SUFFIXES
    pieces = list(dict.fromkeys(pieces))
    return [(piece, 0.0 if index < 3 else -8.0) for index, piece in enumerate(pieces)]


def write_t5_tokenizer(folder: Path) -> int:
    """tokenizer_2/: tokenizer.json and tokenizer_config.json; returns the vocabulary's size."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = t5_vocabulary()
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", T5_EOS], pair=["$A", T5_EOS, "$B", T5_EOS], special_tokens=[(T5_EOS, 1)]
    )
    tokenizer.add_special_tokens([T5_PAD, T5_EOS, T5_UNK])
    data = json.loads(tokenizer.to_str())
    charsmap = base64.b64encode(precompiled_charsmap(charsmap_rules())).decode()
    data["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    data["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    _write_json(folder / "tokenizer.json", data, indent=None)
    config = {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "extra_ids": 0}
    config |= {"pad_token": T5_PAD, "eos_token": T5_EOS, "unk_token": T5_UNK}
    _write_json(folder / "tokenizer_config.json", config)
    return len(vocabulary)


def learn_merges(counts: dict[str, int], number: int) -> list[tuple[str, str]]:
    """Byte-pair merges of ASCII words, most frequent pair first, ties in alphabetical order (so: reproducible)."""
    words = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    for _ in range(number):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in words.values():
            index = 0
            while index < len(parts) - 1:
                if (parts[index], parts[index + 1]) == best:
                    parts[index : index + 2] = ["".join(best)]
                index += 1
    return merges


def write_clip_tokenizer(folder: Path) -> dict[str, int]:
    """tokenizer/: vocab.json, merges.txt and tokenizer_config.json; returns the vocabulary (eos has the highest id)."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Caption words weigh most, so that each becomes one token.
    counts = dict.fromkeys(COMMON_WORDS, 1) | dict.fromkeys(CAPTION_WORDS, 50)
    merges = learn_merges(counts, CLIP_VOCABULARY - 2 - 2 * len(alphabet))
    tokens = alphabet + [f"{symbol}</w>" for symbol in alphabet] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), CLIP_BOS, CLIP_EOS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    _write_json(folder / "vocab.json", vocabulary, indent=None)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "add_prefix_space": False}
    config |= {"bos_token": CLIP_BOS, "eos_token": CLIP_EOS, "unk_token": CLIP_EOS, "pad_token": CLIP_EOS}
    _write_json(folder / "tokenizer_config.json", config)
    return vocabulary


def _write_json(path: Path, data: object, indent: int | None = 2) -> None:
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
