"""Tokenizers have the ids and the texts of other libraries, with one corpus for all.

Small tokenizers are trained in the forms in which the families publish theirs. Directories, GGUF
files and Kimi's ranks are written from them.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import settings
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from engine import EngineConfig
from engine.config import BUILTIN_DIR
from engine.engine import load_tokenizer_of
from engine.text.gguf_tokenizer import PATTERNS, read_generation_config, read_tokenizer
from engine.text.sandbox import TemplateError
from engine.text.tokenizer import BackendTokenizer, ChatTemplate, StreamDecoder
from engine.text.tokenizer_files import KIMI_WORDS, HFTokenizer, has_tokenizer
from engine.weights.hub import SMALL_FILES
from engine.weights.model_config import ModelError
from hybridcache.geometry.gguf import GgufFile
from tests.gguf_files import finish, vocabulary
from tests.refused import refused
from tests.selection import num_examples

BOS, EOS, USER = "<s>", "<|im_end|>", "<|im_start|>"
SAMPLE = """
The quick brown fox can't've jumped over 1234567890 lazy dogs, naïve café def f(x): return x**2
# !?... 你好，世界。 北京市Pascal 中文English混合 こんにちは カタカナ 안녕하세요 Привет мир Ωμέγα
שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี 𒀀𒀁 𝔘𝔫𝔦 🫨 👩‍👩‍👧 🇩🇪 ﬁ Å é ① ǆ ß İ ▁ ## <0x41> Ġ
\x00 \x7f \ue000 \u2060 e\u0301 HTTPServer DON'T //x \u0663\u0664\u0665\u0666 \u2167 hello world
"""
WORDS = SAMPLE.split()
GAPS = [" ", "  ", "\n", "\r\n\n", "\t", " \n ", "\u3000", "\xa0", "", "", "'s", " .", "'LL"]
GAPS += ["\ufffd", "!/", "'re", "\n/"]
FLAGGED = ["the", "wor", "<tool>", "<|im_", "|>", EOS, "user", "你", "ab", "#", "x", "b"]
SPECIAL = [*FLAGGED, BOS, EOS, USER, "<think>", "<tool>", "<|im_", "_end|>", "wall"]


def texts(count: int, seed: int = 0) -> Iterable[str]:
    """Yield random texts: words of WORDS and any characters, and some fixed ones."""
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


def compare(ours: BackendTokenizer, theirs: PreTrainedTokenizerFast, corpus: Iterable[str]) -> None:
    """Compare ids and texts with those of transformers. The second time, pieces are known."""
    for text in corpus:
        for with_special in (False, False, True):
            ids = theirs(text, add_special_tokens=with_special).input_ids
            assert ours.encode(text, add_special_tokens=with_special) == ids, text
        for skips in (False, True):
            whole = theirs.decode(ids, skip_special_tokens=skips)
            stream = StreamDecoder(ours, skips)
            pieces = [*map(stream.push, ids), stream.flush()]
            assert "".join(pieces) == ours.decode(ids, skips) == whole, text


def compare_backend(
    backend: Backend, count: int, added: dict[int, AddedToken] | None = None, **named: Any
) -> None:
    """Compare ``count`` texts by a tokenizer of the library with the given settings."""
    added = added or {}
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, added_tokens_decoder=added, **named)
    listed = {str(i): token.__getstate__() for i, token in added.items()}
    ours = BackendTokenizer(copy.deepcopy(backend), named | {"added_tokens_decoder": listed})
    compare(ours, theirs, texts(count))


# --- Published forms ------------------------------------------------------------------------------

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
START = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
NO_HAN = r"&&[^\p{Han}]"
QWEN3 = rf"{CONTRACTIONS}|{START}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{END}"
QWEN3_5 = QWEN3.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"^\s\p{L}", r"^\s\p{L}\p{M}")
LLAMA3 = QWEN3.replace(r"\p{N}|", r"\p{N}{1,3}|")
TEKKEN = rf"{START}[{UPPER}]*[{LOWER}]+|{START}[{UPPER}]+[{LOWER}]*|"
TEKKEN += rf"\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{END}"
GPT4O = rf"{START}[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?|{START}[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?|"
GPT4O += rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{END}"
KIMI = rf"[\p{{Han}}]+|{START}[{UPPER}{NO_HAN}]*[{LOWER}{NO_HAN}]+{CONTRACTIONS}?|"
KIMI += rf"{START}[{UPPER}{NO_HAN}]+[{LOWER}{NO_HAN}]*{CONTRACTIONS}?|"
KIMI += rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{END}"
SPECIALS = [AddedToken(text, special=True) for text in (BOS, EOS, USER)]
MARKS = [AddedToken("<think>", special=False, normalized=False)]


def byte_level(*before: Any, **flags: Any) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, **flags)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Return the step of byte-level tokenizers that splits words by ``pattern``."""
    return byte_level(pre_tokenizers.Split(Regex(pattern), "isolated"), use_regex=False)


def trained(model: Any, normalizer: Any, before: Any, decoder: Any) -> Backend:
    """Train a tokenizer on WORDS. Its letters are bytes, or it has a token for each byte."""
    backend = Backend(model)
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, before, decoder
    is_byte_level = "ByteLevel" in f"{normalizer}{before}"
    words = {"vocab_size": 700, "special_tokens": ["<unk>"], "show_progress": False}
    if is_byte_level:
        words["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(**words)
    if isinstance(model, models.Unigram):
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **words)
    backend.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    described = json.loads(backend.to_str())
    described["added_tokens"] = []
    if described["model"].get("ignore_merges"):
        del described["model"]["merges"][::3]  # Some words are tokens and no result of merges.
    if not is_byte_level:
        described["model"]["byte_fallback"] = True
        vocab, tokens = described["model"]["vocab"], [f"<0x{byte:02X}>" for byte in range(256)]
        if isinstance(vocab, list):
            vocab.extend([token, -20.0] for token in tokens)
        else:
            vocab.update({token: len(vocab) + rank for rank, token in enumerate(tokens)})
    backend = Backend.from_str(json.dumps(described))
    backend.add_tokens([*SPECIALS, *MARKS])
    return backend


def with_bos(backend: Backend, *before: Any) -> Backend:
    """Add the step that puts BOS before a text."""
    bos = processors.TemplateProcessing(
        f"{BOS} $A", f"{BOS} $A {BOS} $B", [(BOS, backend.token_to_id(BOS))]
    )
    backend.post_processor = processors.Sequence([*before, bos]) if before else bos
    return backend


def in_bytes(before: Any, normalizer: Any = None, decoder: Any = None, **flags: Any) -> Backend:
    """Return a byte-level tokenizer."""
    return trained(models.BPE(**flags), normalizer, before, decoder or decoders.ByteLevel())


def metaspace(scheme: str) -> pre_tokenizers.Metaspace:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)


DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA2_NORMALIZER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LLAMA2_STEPS = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
LLAMA2_DECODER = decoders.Sequence([*LLAMA2_STEPS, decoders.Strip(" ", 1, 0)])
PIECES = {"unk_token": "<unk>", "fuse_unk": True}
FORMS: dict[str, Callable[[], Backend]] = {
    "built in": lambda: Backend.from_file(str(BUILTIN_DIR / "tokenizer.json")),
    "qwen3": lambda: in_bytes(split(QWEN3), normalizers.NFC()),
    "qwen3_5": lambda: in_bytes(split(QWEN3_5), normalizers.NFC()),
    "granite": lambda: in_bytes(byte_level(use_regex=True)),
    "granite, digits": lambda: in_bytes(byte_level(DIGITS, use_regex=True)),
    "nemotron_h": lambda: with_bos(
        in_bytes(split(LLAMA3), ignore_merges=True), processors.ByteLevel(trim_offsets=False)
    ),
    "falcon_h1": lambda: in_bytes(
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), byte_level(), DIGITS])
    ),
    "olmo_hybrid": lambda: in_bytes(split(LLAMA3), normalizers.NFC(), ignore_merges=False),
    "lfm2": lambda: with_bos(
        in_bytes(
            split(LLAMA3), decoder=decoders.Sequence([decoders.ByteLevel()]), ignore_merges=True
        )
    ),
    "lfm2, deeper": lambda: in_bytes(
        pre_tokenizers.Sequence([split(LLAMA3)]),
        decoder=decoders.Sequence(
            [decoders.Fuse(), decoders.Sequence([decoders.Sequence([decoders.ByteLevel()])])]
        ),
    ),
    "tekken": lambda: with_bos(in_bytes(split(TEKKEN), ignore_merges=True)),
    "gpt-4o": lambda: in_bytes(split(GPT4O)),
    "kimi": lambda: in_bytes(split(KIMI)),
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


@cache
def described(form: str) -> str:
    return FORMS[form]().to_str()


def built(form: str) -> Backend:
    """Return a tokenizer of ``form``, which the test may change."""
    return Backend.from_str(described(form))


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_read_as_in_transformers(form: str) -> None:
    backend = built(form)
    compare_backend(backend, num_examples(300), bos_token=BOS, eos_token=EOS)
    ours, draw = BackendTokenizer(backend, {}), random.Random(1)
    bytes_of = {ours.token_bytes(token_id) for token_id in range(ours.vocab_size)}
    assert b"" not in bytes_of and "\ufffd".encode() not in bytes_of, "no byte is lost"
    assert {bytes((byte,)) for byte in range(256)} <= bytes_of
    for _ in range(num_examples(100)):
        ids = draw.choices(range(ours.vocab_size), k=9)
        found = ours.decode(ids, skip_special_tokens=False)
        assert found.encode("utf-8")
        assert not ours._is_byte_level or found == backend.decode(ids, skip_special_tokens=False)


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
    "Digits": DIGITS,
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
PARTS = {normalizers: NORMALIZERS, pre_tokenizers: PRE_TOKENIZERS, decoders: DECODERS}
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


@pytest.mark.parametrize("normalizer", ["NFD", "Lowercase", "Strip"])
@pytest.mark.parametrize("form", ["granite", "jamba"])
def test_flags_of_added_tokens(form: str, normalizer: str) -> None:
    """Tokens of the settings with any flags, which may begin or end as others do."""
    draw = random.Random(0)
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    for _ in range(num_examples(40)):
        backend = built(form)
        backend.normalizer = NORMALIZERS[normalizer]
        added = {
            900 + number: AddedToken(text, **{flag: draw.random() < 0.3 for flag in flags})
            for number, text in enumerate(draw.sample(FLAGGED, 5))
        }
        named = {"extra_special_tokens": draw.sample(FLAGGED, 2)}
        named["split_special_tokens"] = draw.random() < 0.2
        compare_backend(backend, 10, added, **named)


@pytest.mark.parametrize("module", PARTS)
def test_every_part_of_the_library_is_compared(module: Any) -> None:
    parts = {name for name, one in vars(module).items() if isinstance(one, type)}
    others = {"Normalizer", "PreTokenizer", "Decoder", "DecodeStream", "Sequence", "Precompiled"}
    assert PARTS[module].keys() == parts - others


def assembled(part: str, module: Any, *names: str | None) -> Backend:
    """Return a tokenizer with steps of one part, and no other normalizer or pre-tokenizer."""
    step = module.Sequence([PARTS[module][name] for name in names if name])
    backend = built("granite" if "ByteLevel" in str(step) else "jamba")
    backend.normalizer = backend.pre_tokenizer = None
    setattr(backend, part, step)
    return backend


@pytest.mark.parametrize("first", [None, *NORMALIZERS])
@pytest.mark.parametrize("second", NORMALIZERS)
def test_normalizers_in_pairs(first: str | None, second: str) -> None:
    compare_backend(assembled("normalizer", normalizers, first, second), COUNT)


@pytest.mark.parametrize("first", [None, *PRE_TOKENIZERS])
@pytest.mark.parametrize("second", PRE_TOKENIZERS)
def test_pre_tokenizers_in_pairs(first: str | None, second: str) -> None:
    compare_backend(assembled("pre_tokenizer", pre_tokenizers, first, second), COUNT)


@pytest.mark.parametrize("first", [None, *DECODERS])
@pytest.mark.parametrize("second", DECODERS)
def test_decoders_in_pairs(first: str | None, second: str) -> None:
    """A text of tokens is their bytes one after the other, or the tokenizer is refused."""
    backend = assembled("decoder", decoders, first, second)
    if (first, second) in REFUSED:
        refused(rf"not supported: with its decoder \(.*{second}\)", BackendTokenizer, backend, {})
    else:
        compare_backend(backend, COUNT)


# --- Directories ----------------------------------------------------------------------------------


def write(folder: Path, form: str, **named: Any) -> Path:
    """Write a directory with a tokenizer of ``form`` and its settings."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(described(form))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture(params=["granite", "jamba, metaspace"])
def form(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def compare_files(folder: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    compare(HFTokenizer(folder), theirs, [TEXT, *texts(10)])


def test_tokens_outside_the_byte_alphabet_decode_to_themselves(tmp_path: Path) -> None:
    """Guard against lost answers: vocabularies are padded with such tokens ("<pad 0>"), and a model
    may draw one."""
    made = json.loads(described("granite")) | {"added_tokens": []}
    pad = made["model"]["vocab"]["<pad 0>"] = len(made["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    config = EngineConfig(tokenizer=str(tmp_path))
    refused("belongs to the model", load_tokenizer_of, config, pad)
    for vocab_size in (None, pad + 1):
        tokenizer = load_tokenizer_of(config, vocab_size)
    token_ids = [*tokenizer.encode("naïve"), pad, *tokenizer.encode("x")]
    assert tokenizer.decode(token_ids) == tokenizer._backend.decode(token_ids) == "naïve<pad 0>x"


def test_a_marked_special_token_is_text(form: str, tmp_path: Path) -> None:
    """Check that the text has no special token, and reads the same without the mark."""
    tokenizer = HFTokenizer(write(tmp_path, form))
    special = tokenizer.encode(EOS, add_special_tokens=False)[-1]
    marked = f"hello<\ue001{EOS[1:]} world{EOS}"
    token_ids = tokenizer.encode(marked, add_special_tokens=False, mark="\ue001")
    assert token_ids.count(special) == 1 and token_ids[-1] == special
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    assert text.replace("\u2060", "") == f"hello{EOS} world{EOS}"
    assert tokenizer._is_byte_level == ("\u2060" not in text)
    every = tokenizer.encode(f"{BOS}{USER}{EOS}", add_special_tokens=False)
    assert tokenizer.control_ids == set(every)
    think = tokenizer.encode("<think>", add_special_tokens=False)
    assert tokenizer.decode([*every, *think]) == "<think>"


def test_known_pieces_are_not_shared_between_namespaces(tmp_path: Path) -> None:
    tokenizer, encoded = HFTokenizer(write(tmp_path, "granite")), []
    encode_text = tokenizer._encode_alone
    tokenizer._encode_alone = lambda text, **flags: (
        encoded.append(text) or encode_text(text, **flags)
    )
    for namespace in (None, "a", "b", None, "a", "b"):
        tokenizer.encode("a canary", add_special_tokens=False, namespace=namespace)
    assert encoded == ["a canary"] * 3


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version"')
    refused("cannot be read", HFTokenizer, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_dangling_link_is_no_missing_file(name: str, tmp_path: Path) -> None:
    """As in a cache of the hub whose blobs were removed."""
    write(tmp_path / "model", "granite")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to("../../blobs/4f1c")
    refused(rf"{name} is a link to .*4f1c, which does not exist", HFTokenizer, tmp_path / "model")


def test_chat_templates_are_found_in_all_their_places(tmp_path: Path) -> None:
    def render(tools: Any = None, **named: Any) -> str:
        template = HFTokenizer(write(tmp_path, "granite", **named)).chat_template
        assert isinstance(template, ChatTemplate)
        return template.render([{"role": "user", "content": "hi"}], tools=tools)

    assert render(chat_template="{{ bos_token }}{{ messages[0].content }}") == "hi"
    named = [{"name": name, "template": name} for name in ("default", "tool_use")]
    assert render(chat_template=named) == "default"
    source = "{{ {'b': 1, 'a': '<'}|tojson(separators=(',', ':'), sort_keys=true) }}"
    (tmp_path / "chat_template.jinja").write_text(source)
    assert render() == '{"a":"<","b":1}', "as transformers writes it"
    (folder := tmp_path / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (folder / f"{name}.jinja").write_text(f"{name} {{{{ tools|length }}}}\n")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    said, tool = [{"role": "user", "content": "hi"}], {"name": "f", "parameters": {}}
    for tools in (None, [{"type": "function", "function": tool}]):
        text = theirs.apply_chat_template(said, tools, tokenize=False)
        assert render(tools) == text and text.startswith("tool_use 1" if tools else "{")


TEXT = "hello  world, hello caché <tool> x<tool>  y <|im_end|>" + " hello" * 100
LEFT_BY_TRAINERS = {
    "truncation": {
        "truncation": {
            "direction": "Right",
            "max_length": 5,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    },
    "padding": {
        "padding": {
            "strategy": {"Fixed": 640},
            "direction": "Left",
            "pad_to_multiple_of": 64,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        }
    },
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("left", LEFT_BY_TRAINERS)
def test_settings_left_by_a_trainer_do_not_act(form: str, left: str, tmp_path: Path) -> None:
    """Guard against prompts of 4,001 tokens that are served as 74 of them."""
    expected = HFTokenizer(write(tmp_path, form)).encode(TEXT)
    made = json.loads(described(form))
    part = made["model"] if left == "dropout" else made
    part |= LEFT_BY_TRAINERS[left]
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    assert len(expected) > 100
    assert HFTokenizer(tmp_path).encode(TEXT) == expected


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TOOL = {"content": "<tool>", "special": False} | FLAGS


def listed(*changes: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a settings file for ``<tool>`` with each of the ``changes``."""
    return {"added_tokens_decoder": {str(900 - i): TOOL | one for i, one in enumerate(changes)}}


SETTINGS: dict[str, dict[str, Any]] = {
    "tokens only in the settings": listed({}, {"content": "llo"}),
    "spaces on the left belong to a token": listed({"lstrip": True}),
    "spaces on the right belong to a token": listed({"rstrip": True}),
    "a token is a whole word": listed({"single_word": True}),
    "a token becomes special": listed({"special": True}),
    "other flags of a token in the file": listed({"content": EOS, "lstrip": True}),
    "a named token that is an ordinary one": {"eos_token": "o", "bos_token": "<begin>"},
    "a named token that is listed as an ordinary one": listed({}) | {"pad_token": "<tool>"},
    "more special tokens": {"additional_special_tokens": ["<tool>", "wor"]},
    "more special tokens with names": {"extra_special_tokens": {"tool_token": "<tool>"}},
    "an object as a named token": {
        "eos_token": TOOL | {"__type": "AddedToken", "special": True, "rstrip": True}
    },
    "special tokens are split": {"split_special_tokens": True},
    "a beginning and an end are asked for": {
        "add_bos_token": True,
        "add_eos_token": True,
        "bos_token": EOS,
        "eos_token": EOS,
    },
    "spaces are cleaned up": {"clean_up_tokenization_spaces": True},
    "a longest text": {"model_max_length": 5, "truncation_side": "left", "padding_side": "left"},
    "a prefix": {"add_prefix_space": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_act_as_in_transformers(form: str, setting: str, tmp_path: Path) -> None:
    compare_files(write(tmp_path, form, **SETTINGS[setting]))


def test_files_of_older_versions_of_transformers_are_read(form: str, tmp_path: Path) -> None:
    write(tmp_path, form)
    named = {"eos_token": EOS, "bos_token": {"content": "<begin>"} | FLAGS}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    (tmp_path / "added_tokens.json").write_text(
        json.dumps({"<tool>": 901, "<call>": 902, "wor": 900, EOS: 0})
    )
    compare_files(tmp_path)
    tokenizer = HFTokenizer(tmp_path)
    assert tokenizer.eos_token_ids == {*tokenizer.encode(EOS, add_special_tokens=False)[-1:]}


@pytest.mark.parametrize(
    "named",
    [{"eos_token": 5}, {"added_tokens_decoder": [1]}, {"chat_template": 3}, {"pad_token": {}}],
)
def test_settings_of_other_types_are_named(named: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has a setting of another type"):
        HFTokenizer(write(tmp_path, "granite", **named))


def test_a_tokenizer_needs_no_folder() -> None:
    named = {"eos_token": EOS, "chat_template": "{{ eos_token }}", "pad_token": "<pad>"}
    named |= {"unk_token": "!", "cls_token": "[]"}
    tokenizer = BackendTokenizer(built("granite"), named, eos_token_ids=[7])
    [eos, pad] = tokenizer.encode(f"{EOS}<pad>", add_special_tokens=False)
    assert tokenizer.eos_token_ids == {7, eos} and tokenizer.hidden_ids >= {eos, pad}
    assert tokenizer.chat_template.render([]) == EOS
    assert tokenizer.decode([*tokenizer.encode("naïve!"), pad]) == "naïve"
    assert {*tokenizer.control_tokens} == {BOS, EOS, USER, "<pad>", "[]"}, "one letter is a text"


def test_all_files_of_tokenizers_are_downloaded() -> None:
    files = "tokenizer.json tokenizer.model tiktoken.model tokenizer_config.json vocab.json "
    files += "special_tokens_map.json added_tokens.json merges.txt chat_template.jinja"
    for name in files.split():
        assert any(fnmatch(name, pattern) for pattern in SMALL_FILES), name


# --- Kimi Linear ----------------------------------------------------------------------------------


def write_ranks(folder: Path) -> list[bytes]:
    """Write a directory in the form of Kimi Linear's, with a vocabulary of its own. Return the
    tokens in the order of their ranks."""
    backend = built("granite")
    ordinary = range(1, backend.get_vocab_size(with_added_tokens=False))  # Behind <unk>.
    token_bytes = BackendTokenizer(backend, {}).token_bytes
    tokens = sorted(map(token_bytes, ordinary), key=lambda token: len(token) > 1)
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    named = ("[BOS]", "[EOS]", "<|im_end|>", "<think>")
    settings = {
        "added_tokens_decoder": {
            str(len(tokens) + i): {"content": text, "special": text != "<think>"}
            for i, text in enumerate(named)
        },
        "eos_token": "[EOS]",
        "chat_template": "{{ messages[0].content }}<|im_end|>",
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_linear"}))
    return tokens


def test_ranks_of_kimi_are_read(tmp_path: Path) -> None:
    tokens = write_ranks(tmp_path)
    assert has_tokenizer(tmp_path)
    tokenizer, size = HFTokenizer(tmp_path), len(tokens)
    assert tokenizer.vocab_size == size + 258
    assert tokenizer.eos_token_ids == {size + 1} and tokenizer.chat_template is not None
    text = f"[BOS]hello<think><|reserved_token_{size + 4}|><|im_end|>"
    ids = tokenizer.encode(text)
    assert [i - size for i in ids if i >= size] == [0, 3, 4, 2]
    assert tokenizer.decode(ids) == "hello<think>"
    assert [tokenizer.token_bytes(i) for i in range(size)] == tokens


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("中文English混合", ["中文", "English", "混合"]),
        (" 北京市 Pascal's x", [" ", "北京市", " Pascal's", " x"]),
        ("1234567 ab", ["123", "456", "7", " ab"]),
        ("HTTPServer, naïve!\n\n  x", ["HTTPServer", ",", " naïve", "!\n\n", " ", " x"]),
        ("Привет мир", ["Привет", " мир"]),
    ],
)
def test_texts_are_split_as_in_the_program_of_kimi(text: str, words: list[str]) -> None:
    assert KIMI_WORDS == KIMI
    [step, _] = built("kimi").pre_tokenizer
    assert [word for word, _ in step.pre_tokenize_str(text)] == words


def test_ranks_merge_as_in_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: rank for rank, token in enumerate(write_ranks(tmp_path))}
    theirs = tiktoken.Encoding("kimi", pat_str=KIMI, mergeable_ranks=ranks, special_tokens={})
    ours = HFTokenizer(tmp_path)
    for text in texts(num_examples(400)):
        plain = text.replace("<", "")  # No special token.
        assert ours.encode(plain, add_special_tokens=False) == theirs.encode_ordinary(plain)


def test_files_that_cannot_be_converted_are_named(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text("no rank here")
    refused(r"tiktoken\.model cannot be read .*: download it again", HFTokenizer, tmp_path)
    (tmp_path / "tiktoken.model").rename(tmp_path / "tokenizer.model")
    refused(r"cannot be converted .*put the model's tokenizer\.json", HFTokenizer, tmp_path)


# --- GGUF files -----------------------------------------------------------------------------------

KINDS = {
    "qwen2": ("qwen3", QWEN3),
    "qwen35": ("qwen3_5", QWEN3_5),
    "llama-bpe": ("nemotron_h", LLAMA3),
    "tekken": ("tekken", TEKKEN),
    "gpt-4o": ("gpt-4o", GPT4O),
    "kimi-k2": ("kimi", KIMI),
    "gpt-2": ("granite", ""),
    "refact": ("granite, digits", r"\p{N}"),
}
"""Form and pattern of published tokenizers, by kind of llama.cpp."""


def stored(folder: Path, metadata: dict[str, Any]) -> GgufFile:
    """Write a file. Keys without a point are of its tokenizer."""
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen3")
    for key, value in metadata.items():
        name = key if "." in key else f"tokenizer.ggml.{key}"
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    finish(writer)
    return GgufFile(folder / "model.gguf")


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_has_the_ids_of_the_tokenizer_json(kind: str, tmp_path: Path) -> None:
    form, _ = KINDS[kind]
    original = built(form)
    named = {"eos_token": {"content": EOS}, "chat_template": "{{ messages }}", "bos_token": BOS}
    write(tmp_path, form, **named)
    size = original.get_vocab_size() + 5
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    found = read_tokenizer(stored(tmp_path, vocabulary(tmp_path, kind)))
    for text in texts(num_examples(1000), seed=2):
        for with_special in (False, True):
            expected = original.encode(text, add_special_tokens=with_special).ids
            ids = found.backend.encode(text, add_special_tokens=with_special).ids
            assert ids == expected, text
        assert found.backend.decode(ids, False) == original.decode(ids, False)
    assert original.token_to_id(EOS) in found.eos_token_ids
    assert found.settings == named | {"eos_token": EOS}
    assert "[PAD" not in "".join(found.backend.get_vocab())


def test_every_kind_of_words_is_one_that_is_published() -> None:
    assert {*PATTERNS.values()} == {pattern for _, pattern in KINDS.values()}


def test_built_in_model_has_its_template_and_end_tokens(tmp_path: Path) -> None:
    found = read_tokenizer(stored(tmp_path, vocabulary(BUILTIN_DIR, "gpt-2")))
    original = HFTokenizer(BUILTIN_DIR)
    for text in texts(num_examples(200), seed=3):
        expected = original.encode(text, add_special_tokens=False)
        assert found.backend.encode(text, add_special_tokens=False).ids == expected
    template = ChatTemplate(found.settings["chat_template"])
    chat = [{"role": "user", "content": "größer"}, {"role": "assistant", "content": "ja"}]
    options = {"add_generation_prompt": True, "tools": [{"function": {"name": "f"}}]}
    assert template.render(chat, **options) == original.chat_template.render(chat, **options)
    assert found.eos_token_ids == original.eos_token_ids | {256}  # <|endoftext|> too.


@cache
def pieces() -> dict[str, Any]:
    """Return the metadata of a vocabulary like those of SentencePiece."""
    trainer = trainers.BpeTrainer(vocab_size=600, limit_alphabet=60, show_progress=False)
    made = Backend(models.BPE())
    made.train_from_iterator((text.replace(" ", "▁") for text in texts(600, seed=4)), trainer)
    learned = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    special = ["<unk>", BOS, "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    words = [token for token in learned if token not in special]
    return {
        "model": "llama",
        "tokens": special + words,
        "token_type": [2, 3, 3, *([6] * 256), *([1] * len(words))],
        "scores": [0.0] * len(special) + [float(-rank) for rank in range(len(words))],
        **{"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2},
    }


def plain_ids(text: str, metadata: dict[str, Any]) -> list[int]:
    """Merge the two neighbours with the best score, the first of equals, until there are none."""
    ids = {token: token_id for token_id, token in enumerate(metadata["tokens"])}
    scores = metadata["scores"]
    found: list[int] = []
    for part in re.split("(<s>|</s>)", text):
        if part in (BOS, "</s>"):
            found.append(ids[part])
            continue
        symbols = list("▁" + part.replace(" ", "▁")) if part else []
        while True:
            joined = [left + right for left, right in itertools.pairwise(symbols)]
            known = [(-scores[ids[one]], at) for at, one in enumerate(joined) if one in ids]
            if not known:
                break
            at = min(known)[1]
            symbols[at : at + 2] = [joined[at]]
        for symbol in symbols:
            own = [ids[symbol]] if symbol in ids else []
            found += own or [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def test_sentence_pieces_have_the_ids_of_the_plain_algorithm(tmp_path: Path) -> None:
    metadata = pieces()
    found = read_tokenizer(stored(tmp_path, metadata))
    num_bytes = 0
    for text in texts(num_examples(2000), seed=5):
        expected = plain_ids(text, metadata)
        assert found.backend.encode(text, add_special_tokens=False).ids == expected, text
        if not any(mark in text for mark in (BOS, "<0x")) and not text.startswith(" "):
            assert found.backend.decode(expected, False) == text.replace("▁", " ")
        num_bytes += sum(3 <= token_id < 259 for token_id in expected)
    assert num_bytes > 100
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert found.settings == named


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": True}])
def test_tokens_around_a_text_are_those_of_the_file(flags: dict[str, bool], tmp_path: Path) -> None:
    """SentencePiece models have a BOS unless the file says otherwise."""
    backend = read_tokenizer(stored(tmp_path, pieces() | flags)).backend
    alone = backend.encode("the", add_special_tokens=False).ids
    assert backend.encode("the").ids == ([*alone, 2] if flags else [1, *alone])


def test_texts_without_a_prefix_keep_their_first_space(tmp_path: Path) -> None:
    backend = read_tokenizer(stored(tmp_path, pieces() | {"add_space_prefix": False})).backend
    ids = backend.encode(" the", add_special_tokens=False).ids
    assert backend.decode(ids) == " the"


VALID = {
    "model": "gpt2",
    "pre": "qwen2",
    "tokens": ["a", "b", "ab", "<|im_end|>"],
    "token_type": [1, 1, 1, 3],
    "merges": ["a b"],
    "eos_token_id": 3,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "of the kind 'bert', which is not supported: name"),
        ({"pre": "klingon"}, "splits words as 'klingon' does, which is not supported: name"),
        ({"tokens": [1, 2]}, "has no list tokenizer.ggml.tokens"),
        ({"merges": ["a c"]}, "cannot be used"),
        ({"merges": ["ab"]}, "cannot be used"),
        ({"merges": [1]}, "has no list tokenizer.ggml.merges"),
        ({"model": "llama"}, "has no tokenizer.ggml.scores for all tokens"),
        ({"model": "llama", "scores": [1.0]}, "has no tokenizer.ggml.scores for all tokens"),
    ],
)
def test_vocabularies_that_cannot_be_used_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as error:
        read_tokenizer(stored(tmp_path, VALID | changes))
    assert str(error.value).startswith("the tokenizer in model.gguf ")
    assert message in str(error.value)


def test_files_may_have_no_tokenizer_and_no_types(tmp_path: Path) -> None:
    assert read_tokenizer(stored(tmp_path, {})) is None
    assert read_tokenizer(stored(tmp_path, {"model": "none"})) is None
    plain = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "", "b"]}
    found = read_tokenizer(stored(tmp_path, plain))
    assert found.backend.encode("ab").ids == [0, 2]
    assert (found.settings, found.eos_token_ids) == ({}, frozenset())
    ends = read_tokenizer(stored(tmp_path, VALID | {"eos_token_id": 4, "eot_token_id": 1}))
    assert ends.eos_token_ids == {1, 3}, "there is no token 4, and token 3 always ends an answer"


def test_recommended_sampling_is_read(tmp_path: Path) -> None:
    values = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "sequence": "k;p"}
    file = stored(tmp_path, {f"general.sampling.{key}": value for key, value in values.items()})
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    path = file.paths[0]
    assert read_generation_config(path) == (path, expected)


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_of_files_run_in_a_sandbox(source: str, tmp_path: Path) -> None:
    file = stored(tmp_path, VALID | {"tokenizer.chat_template": source})
    template = ChatTemplate(read_tokenizer(file).settings["chat_template"])
    with pytest.raises(TemplateError):
        template.render([{"role": "user", "content": "hi"}])
