"""Tests of tokenizers in the forms in which the families publish theirs, and in all forms that the
library has. The reference is transformers.

Vocabularies are trained here. Texts have all scripts, emoji, and special tokens.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from engine.text.tokenizer import BackendTokenizer, StreamDecoder
from tests.selection import num_examples

BOS, EOS, USER = "<s>", "<|im_end|>", "<|im_start|>"
SAMPLE = """
The quick brown fox can't've jumped over 1234567890 lazy dogs, naïve café def f(x): return x**2
# !?... 你好，世界。 北京市Pascal 中文English混合 こんにちは カタカナ 안녕하세요 Привет мир Ωμέγα
שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี 𒀀𒀁 𝔘𝔫𝔦 🫨 👩‍👩‍👧 🇩🇪 ﬁ Å é ① ǆ ß İ ▁ ## <0x41> Ġ
\x00 \x7f \ue000 \u2060
"""
WORDS = SAMPLE.split()
GAPS = [" ", "  ", "\n", "\r\n\n", "\t", "\u3000", "\xa0", "", "", "'s", " .", "'LL", "\ufffd"]
FLAGGED = ["the", "wor", "<tool>", "<|im_", "|>", EOS, "user", "你", "ab", "#", "x", "b"]
SPECIAL = [*FLAGGED, BOS, EOS, USER, "<think>", "<tool>", "<|im_", "_end|>", "wall"]


def texts(count: int, seed: int = 0) -> Iterable[str]:
    """Yield random texts: words of WORDS and any characters, and one text of each character."""
    draw = random.Random(seed)
    yield from ("", " ", "a", EOS, f" {EOS} ", f"{USER}user\n{EOS}\n{USER}a", "a" * 300)

    def part() -> str:
        kind = draw.random()
        if kind < 0.6:
            return draw.choice(WORDS).strip(" ")
        if kind < 0.8:
            return draw.choice(SPECIAL)
        letters = (draw.choice((0x7F, 0x7FF, 0xD7FF, 0x1FFFF)) for _ in range(draw.randrange(4)))
        return (
            "".join(chr(draw.randrange(last)) for last in letters)
            .encode("utf-8", "replace")
            .decode()
        )

    for _ in range(count):
        yield "".join(part() + draw.choice(GAPS) for _ in range(draw.randrange(1, 12)))


def compare(
    backend: Tokenizer, count: int, added: dict[int, AddedToken] | None = None, **named: Any
) -> None:
    """Compare ids and texts with those of transformers, for ``count`` texts."""
    added = added or {}
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, added_tokens_decoder=added, **named)
    listed = {str(i): token.__getstate__() for i, token in added.items()}
    ours = BackendTokenizer(copy.deepcopy(backend), named | {"added_tokens_decoder": listed})
    for text in texts(count):
        for with_special in (False, True):
            ids = theirs(text, add_special_tokens=with_special).input_ids
            assert ours.encode(text, add_special_tokens=with_special) == ids, text
        for skips in (False, True):
            whole = theirs.decode(ids, skip_special_tokens=skips)
            stream = StreamDecoder(ours, skips)
            pieces = [*map(stream.push, ids), stream.flush()]
            assert "".join(pieces) == ours.decode(ids, skips) == whole, text


# --- Published forms ------------------------------------------------------------------------------

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{LETTERS}|\p{{N}}|{REST}"
QWEN3_5 = QWEN3.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"^\s\p{L}", r"^\s\p{L}\p{M}")
LLAMA3 = QWEN3.replace(r"\p{N}|", r"\p{N}{1,3}|")
SPECIALS = [AddedToken(text, special=True) for text in (BOS, EOS, USER)]
MARKS = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "<tool>")]


def byte_level(*before: Any, **flags: Any) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, **flags)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def trained(model: Any, normalizer: Any, before: Any, decoder: Any) -> Tokenizer:
    """Train a tokenizer on WORDS. Its letters are bytes, or it has a token for each byte."""
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, before, decoder
    is_byte_level = "ByteLevel" in f"{normalizer}{before}"
    words = {"vocab_size": 700, "special_tokens": ["<unk>"], "show_progress": False}
    if is_byte_level:
        words["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    if isinstance(model, models.BPE):
        trainer: Any = trainers.BpeTrainer(**words)
    elif isinstance(model, models.Unigram):
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **words)
    elif isinstance(model, models.WordPiece):
        trainer = trainers.WordPieceTrainer(**words)
    else:
        trainer = trainers.WordLevelTrainer(**words)
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    described = json.loads(backend.to_str())
    described["added_tokens"] = []
    if isinstance(model, models.BPE | models.Unigram) and not is_byte_level:
        described["model"]["byte_fallback"] = True
        vocab, tokens = described["model"]["vocab"], [f"<0x{byte:02X}>" for byte in range(256)]
        if isinstance(vocab, list):
            vocab.extend([token, -20.0] for token in tokens)
        else:
            vocab.update({token: len(vocab) + rank for rank, token in enumerate(tokens)})
    backend = Tokenizer.from_str(json.dumps(described))
    backend.add_tokens([*SPECIALS, *MARKS])
    return backend


def with_bos(backend: Tokenizer, *before: Any) -> Tokenizer:
    """Add the step that puts BOS before a text."""
    bos = processors.TemplateProcessing(
        f"{BOS} $A", f"{BOS} $A {BOS} $B", [(BOS, backend.token_to_id(BOS))]
    )
    backend.post_processor = processors.Sequence([*before, bos]) if before else bos
    return backend


def in_bytes(before: Any, normalizer: Any = None, decoder: Any = None, **flags: Any) -> Tokenizer:
    """Return a byte-level tokenizer."""
    return trained(models.BPE(**flags), normalizer, before, decoder or decoders.ByteLevel())


def metaspace(scheme: str) -> pre_tokenizers.Metaspace:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


LLAMA2_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LLAMA2_STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
LLAMA2_DECODER = decoders.Sequence([*LLAMA2_STEPS, decoders.Strip(" ", 1, 0)])
PIECES = {"unk_token": "<unk>", "fuse_unk": True}
FORMS: dict[str, Callable[[], Tokenizer]] = {
    "qwen3, qwen3_next": lambda: in_bytes(
        byte_level(split(QWEN3), use_regex=False), normalizers.NFC()
    ),
    "qwen3_5": lambda: in_bytes(byte_level(split(QWEN3_5), use_regex=False), normalizers.NFC()),
    "granite_moe_hybrid": lambda: in_bytes(byte_level(use_regex=True)),
    "granite_moe_hybrid, digits": lambda: in_bytes(
        byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True)
    ),
    "nemotron_h": lambda: with_bos(
        in_bytes(byte_level(split(LLAMA3), use_regex=False), ignore_merges=True),
        processors.ByteLevel(trim_offsets=False),
    ),
    "falcon_h1": lambda: in_bytes(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(individual_digits=True),
            ]
        )
    ),
    "olmo_hybrid": lambda: in_bytes(
        byte_level(split(LLAMA3), use_regex=False), normalizers.NFC(), ignore_merges=False
    ),
    "lfm2": lambda: with_bos(
        in_bytes(
            byte_level(split(LLAMA3), use_regex=False),
            decoder=decoders.Sequence([decoders.ByteLevel()]),
            ignore_merges=True,
        )
    ),
    "lfm2, deeper": lambda: in_bytes(
        pre_tokenizers.Sequence([byte_level(split(LLAMA3), use_regex=False)]),
        decoder=decoders.Sequence(
            [decoders.Fuse(), decoders.Sequence([decoders.Sequence([decoders.ByteLevel()])])]
        ),
    ),
    "jamba": lambda: with_bos(
        trained(models.BPE(**PIECES), LLAMA2_NORMALIZER, None, LLAMA2_DECODER)
    ),
    "jamba, metaspace": lambda: with_bos(
        trained(models.BPE(**PIECES), None, metaspace("first"), LLAMA2_DECODER)
    ),
    "without a space before": lambda: trained(
        models.BPE(**PIECES), normalizers.Replace(" ", "▁"), None, decoders.Sequence(LLAMA2_STEPS)
    ),
    "unigram": lambda: with_bos(
        trained(models.Unigram(), normalizers.NFKC(), metaspace("always"), LLAMA2_DECODER)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_read_as_in_transformers(form: str) -> None:
    backend = FORMS[form]()
    compare(backend, num_examples(300), bos_token=BOS, eos_token=EOS)
    ours = BackendTokenizer(backend, {})
    bytes_of = {ours.token_bytes(token_id) for token_id in range(ours.vocab_size)}
    assert b"" not in bytes_of and "\ufffd".encode() not in bytes_of, "no byte is lost"
    assert {bytes((byte,)) for byte in range(256)} <= bytes_of


# --- All forms of the library ---------------------------------------------------------------------

NORMALIZERS = {
    "BertNormalizer": normalizers.BertNormalizer(),
    "ByteLevel": normalizers.ByteLevel(),
    "Lowercase": normalizers.Lowercase(),
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "Nmt": normalizers.Nmt(),
    "Prepend": normalizers.Prepend("▁"),
    "Replace": normalizers.Replace(Regex(" +"), "▁"),
    "Strip": normalizers.Strip(),
    "StripAccents": normalizers.StripAccents(),
}
PRE_TOKENIZERS = {
    "BertPreTokenizer": pre_tokenizers.BertPreTokenizer(),
    "ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "CharDelimiterSplit": pre_tokenizers.CharDelimiterSplit("x"),
    "Digits": pre_tokenizers.Digits(individual_digits=True),
    "FixedLength": pre_tokenizers.FixedLength(3),
    "Metaspace": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "Punctuation": pre_tokenizers.Punctuation(),
    "Split": pre_tokenizers.Split(Regex(QWEN3), "merged_with_next"),
    "UnicodeScripts": pre_tokenizers.UnicodeScripts(),
    "Whitespace": pre_tokenizers.Whitespace(),
    "WhitespaceSplit": pre_tokenizers.WhitespaceSplit(),
}
DECODERS = {
    "BPEDecoder": decoders.BPEDecoder("e"),
    "ByteFallback": decoders.ByteFallback(),
    "ByteLevel": decoders.ByteLevel(),
    "CTC": decoders.CTC("e", "a"),
    "Fuse": decoders.Fuse(),
    "Metaspace": decoders.Metaspace(),
    "Replace": decoders.Replace("▁", " "),
    "Strip": decoders.Strip(" ", 2, 0),
    "WordPiece": decoders.WordPiece("▁"),
}
TEXTS = ("Metaspace", "Replace", "Strip", "WordPiece")
REFUSED = {
    *(
        pair
        for name in DECODERS
        for one in ("BPEDecoder", "CTC")
        for pair in ((name, one), (one, name))
    ),
    *((None, name) for name in ("BPEDecoder", "CTC")),
    *(
        pair
        for name in (*TEXTS, "ByteFallback")
        for pair in (("ByteLevel", name), (name, "ByteLevel"))
    ),
    *(("ByteFallback", name) for name in TEXTS),
    *(("Fuse", name) for name in ("Strip", "WordPiece", "ByteFallback")),
    ("WordPiece", "ByteFallback"),
}
"""Pairs of steps that make the text of a token depend on others, or that mix letters with bytes."""
COUNT = 300 if settings.get_current_profile_name() == "thorough" else num_examples(40)


@cache
def described(form: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FORMS[form]().to_str())
    return found


def assembled(**parts: Any) -> Tokenizer:
    """Return a tokenizer of the given parts."""
    is_byte_level = any("ByteLevel" in str(part) for part in parts.values())
    form = "granite_moe_hybrid" if is_byte_level else "jamba"
    backend = Tokenizer.from_str(json.dumps(described(form)))
    parts = {"normalizer": None, "pre_tokenizer": None} | parts
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


@pytest.mark.parametrize("normalizer", ["NFD", "Lowercase", "Strip"])
@pytest.mark.parametrize("form", ["granite_moe_hybrid", "jamba"])
def test_flags_of_added_tokens(form: str, normalizer: str) -> None:
    """Tokens of the settings with any flags, which may begin or end as others do."""
    draw = random.Random(0)
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for _ in range(num_examples(40)):
        backend = Tokenizer.from_str(json.dumps(described(form)))
        backend.normalizer = NORMALIZERS[normalizer]
        added = {
            900 + number: AddedToken(text, **{flag: draw.random() < 0.3 for flag in flags})
            for number, text in enumerate(draw.sample(FLAGGED, 5))
        }
        named = {"extra_special_tokens": draw.sample(FLAGGED, 2)}
        named["split_special_tokens"] = draw.random() < 0.2
        compare(backend, 10, added, **named)


@pytest.mark.parametrize("module", [normalizers, pre_tokenizers, decoders])
def test_every_part_of_the_library_is_compared(module: Any) -> None:
    listed = {normalizers: NORMALIZERS, pre_tokenizers: PRE_TOKENIZERS, decoders: DECODERS}[module]
    parts = {name for name, one in vars(module).items() if isinstance(one, type)}
    others = {"Normalizer", "PreTokenizer", "Decoder", "DecodeStream", "Sequence", "Precompiled"}
    assert listed.keys() == parts - others


@pytest.mark.parametrize("first", [None, *NORMALIZERS])
@pytest.mark.parametrize("second", NORMALIZERS)
def test_normalizers_in_pairs(first: str | None, second: str) -> None:
    parts = [NORMALIZERS[name] for name in (first, second) if name]
    compare(assembled(normalizer=normalizers.Sequence(parts)), COUNT)


@pytest.mark.parametrize("first", [None, *PRE_TOKENIZERS])
@pytest.mark.parametrize("second", PRE_TOKENIZERS)
def test_pre_tokenizers_in_pairs(first: str | None, second: str) -> None:
    parts = [PRE_TOKENIZERS[name] for name in (first, second) if name]
    compare(assembled(pre_tokenizer=pre_tokenizers.Sequence(parts)), COUNT)


@pytest.mark.parametrize("first", [None, *DECODERS])
@pytest.mark.parametrize("second", DECODERS)
def test_decoders_in_pairs(first: str | None, second: str) -> None:
    """A text of tokens is their bytes one after the other, or the tokenizer is refused."""
    names = [name for name in (first, second) if name]
    backend = assembled(decoder=decoders.Sequence([DECODERS[name] for name in names]))
    if (first, second) in REFUSED:
        with pytest.raises(ValueError, match="not supported: with its decoder"):
            BackendTokenizer(backend, {})
    else:
        compare(backend, COUNT)
