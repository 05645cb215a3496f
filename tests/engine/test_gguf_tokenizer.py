"""Tokenizers from GGUF files have the ids of the tokenizer.json that the files were made from."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engine.config import BUILTIN_DIR
from engine.text.gguf_tokenizer import PATTERNS, read_generation_config, read_tokenizer
from engine.text.sandbox import TemplateError
from engine.text.tokenizer import ChatTemplate
from engine.text.tokenizer_files import HFTokenizer
from engine.weights.model_config import ModelError
from experiments.benchmarks.gguf_files import vocabulary
from hybridcache.geometry.gguf import GgufFile
from tests import selection

RANGES = "az AZ 09 \u00c0\u024f \u0300\u0345 \u0391\u03c9 \u0410\u044f \u05d0\u05ea \u0621\u064a"
RANGES += " \u064b\u0652 \u0905\u0939 \u093e\u094c \u0e01\u0e2e \u4e00\u4e40 \u3042\u3093"
RANGES += " \uac00\uac40 \u2160\u2188 \U0001f600\U0001f640 !/ :@"
SPACE = "\u2581"
SCRIPTS = [[chr(n) for n in range(ord(pair[0]), ord(pair[1]) + 1)] for pair in RANGES.split()]
PIECES = [" ", "  ", "\n", "\r\n", "\t", " \n ", "'s", "'LL", "don't", "1234567", "the ", "Ünïcode"]
PIECES += ["e\u0301", "\u00a0", "\u200d", "\u2581", "<|im_start|>", "<|im_end|>", "<think>", "<s>"]


def texts(count: int, seed: int) -> list[str]:
    """Return random texts with all scripts, spaces, contractions and special tokens."""
    chance = random.Random(seed)

    def piece() -> str:
        if chance.random() < 0.3:
            return chance.choice(PIECES)
        letters = chance.choice(SCRIPTS)
        return "".join(chance.choices(letters, k=chance.randint(1, 6)))

    return ["".join(piece() for _ in range(chance.randint(1, 12))) for _ in range(count)]


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
START = r"[^\r\n\p{L}\p{N}]?"
PUBLISHED = {
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END,
    "qwen35": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + END,
    "llama-bpe": CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + END,
    "tekken": rf"{START}[{UPPER}]*[{LOWER}]+|{START}[{UPPER}]+[{LOWER}]*|"
    + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + END,
    "gpt-4o": rf"{START}[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?|"
    + rf"{START}[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?|"
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + END,
    "kimi-k2": r"[\p{Han}]+|"
    + rf"{START}[{UPPER}&&[^\p{{Han}}]]*[{LOWER}&&[^\p{{Han}}]]+{CONTRACTIONS}?|"
    + rf"{START}[{UPPER}&&[^\p{{Han}}]]+[{LOWER}&&[^\p{{Han}}]]*{CONTRACTIONS}?|"
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + END,
    "gpt-2": "",
    "refact": "",
}
"""Patterns of published tokenizers, by kind of llama.cpp."""


def trained(folder: Path, pre: str) -> Tokenizer:
    """Train a tokenizer that splits words like ``pre``, and write its files."""
    made = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not PUBLISHED[pre])
    steps = [pre_tokenizers.Split(Regex(PUBLISHED[pre]), "isolated")] if PUBLISHED[pre] else []
    steps += [pre_tokenizers.Digits(individual_digits=True)] if pre == "refact" else []
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, level])
    made.decoder = decoders.ByteLevel()
    if pre.startswith("qwen"):
        made.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts(3000, seed=1), trainer)
    made.add_tokens(["<think>"])
    made.save(str(folder / "tokenizer.json"))
    size = made.get_vocab_size() + 5
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    settings = {"eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def stored(path: Path, metadata: dict) -> GgufFile:
    writer = gguf.GGUFWriter(path / "model.gguf", "qwen3")
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile(path / "model.gguf")


@pytest.mark.parametrize("pre", PUBLISHED)
def test_ids_equal_those_of_the_tokenizer_json(pre, tmp_path) -> None:
    original = trained(tmp_path, pre)
    found = read_tokenizer(stored(tmp_path, vocabulary(tmp_path, pre)))
    for text in texts(selection.num_examples(2000), seed=2):
        expected = original.encode(text, add_special_tokens=False).ids
        ids = found.backend.encode(text, add_special_tokens=False).ids
        assert ids == expected, text
        assert found.backend.decode(ids, False) == original.decode(ids, False)
    assert original.token_to_id("<|im_end|>") in found.eos_token_ids
    assert found.settings == {"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    assert "[PAD" not in "".join(found.backend.get_vocab())


def test_every_kind_of_words_is_one_that_is_published() -> None:
    patterns = {PUBLISHED[pre] for pre in PUBLISHED if PUBLISHED[pre]}
    assert {pattern for pattern in PATTERNS.values() if len(pattern) > 10} == patterns


def test_built_in_model_has_its_ids_template_and_end_tokens(tmp_path) -> None:
    found = read_tokenizer(stored(tmp_path, vocabulary(BUILTIN_DIR, "gpt-2")))
    original = HFTokenizer(BUILTIN_DIR)
    for text in texts(selection.num_examples(2000), seed=3):
        expected = original.encode(text, add_special_tokens=False)
        assert found.backend.encode(text, add_special_tokens=False).ids == expected
    template = ChatTemplate(found.settings["chat_template"])
    chat = [{"role": "user", "content": "größer"}, {"role": "assistant", "content": "ja"}]
    options = {"add_generation_prompt": True, "tools": [{"function": {"name": "f"}}]}
    assert template.render(chat, **options) == original.chat_template.render(chat, **options)
    assert found.eos_token_ids == original.eos_token_ids | {256}  # <|endoftext|> too.


def pieces() -> dict[str, Any]:
    """Return the metadata of a vocabulary like those of SentencePiece."""
    trainer = trainers.BpeTrainer(vocab_size=1200, limit_alphabet=150, show_progress=False)
    made = Tokenizer(models.BPE())
    made.train_from_iterator((text.replace(" ", SPACE) for text in texts(1500, seed=4)), trainer)
    learned = sorted(made.get_vocab(), key=made.get_vocab().__getitem__)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    words = [token for token in learned if token not in special]
    metadata = {
        "model": "llama",
        "tokens": special + words,
        "token_type": [2, 3, 3, *([6] * 256), *([1] * len(words))],
        "scores": [0.0] * len(special) + [float(-rank) for rank in range(len(words))],
        **{"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2},
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def plain_ids(text: str, metadata: dict[str, Any]) -> list[int]:
    """Merge the two neighbours with the best score, the first of equals, until there are none."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    found: list[int] = []
    for part in re.split("(<s>|</s>)", text):
        if part in ("<s>", "</s>"):
            found.append(ids[part])
            continue
        symbols = list(SPACE + part.replace(" ", SPACE)) if part else []
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


def test_sentence_pieces_have_the_ids_of_the_plain_algorithm(tmp_path) -> None:
    metadata = pieces()
    found = read_tokenizer(stored(tmp_path, metadata))
    num_bytes = 0
    for text in texts(selection.num_examples(2000), seed=5):
        expected = plain_ids(text, metadata)
        assert found.backend.encode(text, add_special_tokens=False).ids == expected, text
        if "<s>" not in text and not text.startswith(" "):
            assert found.backend.decode(expected, False) == text.replace(SPACE, " ")
        num_bytes += sum(3 <= token_id < 259 for token_id in expected)
    assert num_bytes > 100
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    assert found.settings == named


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False, "add_eos_token": True}])
def test_tokens_around_a_text_are_those_of_the_file(flags, tmp_path) -> None:
    """SentencePiece models have a BOS unless the file says otherwise."""
    metadata = pieces()
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    backend = read_tokenizer(stored(tmp_path, metadata)).backend
    alone = backend.encode("the", add_special_tokens=False).ids
    expected = [1, *alone] if not flags else [*alone, 2]
    assert backend.encode("the").ids == expected


def test_texts_without_a_prefix_keep_their_first_space(tmp_path) -> None:
    metadata = pieces()
    metadata["tokenizer.ggml.add_space_prefix"] = False
    backend = read_tokenizer(stored(tmp_path, metadata)).backend
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
def test_vocabularies_that_cannot_be_used_are_refused(changes, message, tmp_path) -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in (VALID | changes).items()}
    with pytest.raises(ModelError) as error:
        read_tokenizer(stored(tmp_path, metadata))
    assert str(error.value).startswith("the tokenizer in model.gguf ")
    assert message in str(error.value)


def test_files_may_have_no_tokenizer_and_no_types(tmp_path) -> None:
    assert read_tokenizer(stored(tmp_path, {})) is None
    assert read_tokenizer(stored(tmp_path, {"tokenizer.ggml.model": "none"})) is None
    plain = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    found = read_tokenizer(stored(tmp_path, plain | {"tokenizer.ggml.tokens": ["a", "", "b"]}))
    assert found.backend.encode("ab").ids == [0, 2]
    assert (found.settings, found.eos_token_ids) == ({}, frozenset())


def test_recommended_sampling_is_read(tmp_path) -> None:
    values = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "sequence": "k;p"}
    file = stored(tmp_path, {f"general.sampling.{key}": value for key, value in values.items()})
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    assert read_generation_config(file) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_of_files_run_in_a_sandbox(source, tmp_path) -> None:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in VALID.items()}
    file = stored(tmp_path, metadata | {"tokenizer.chat_template": source})
    template = ChatTemplate(read_tokenizer(file).settings["chat_template"])
    with pytest.raises(TemplateError):
        template.render([{"role": "user", "content": "hi"}])
