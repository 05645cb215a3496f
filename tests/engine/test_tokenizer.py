"""Tests of tokenizers: round trips, and streamed pieces without broken UTF-8."""

from __future__ import annotations

import base64
import functools
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast as TokenizersBackend

from engine import EngineConfig
from engine.engine import load_tokenizer_of
from engine.text.tokenizer import BackendTokenizer, ChatTemplate, StreamDecoder, Tokenizer
from engine.text.tokenizer_files import KIMI_WORDS, HFTokenizer, has_tokenizer
from engine.weights.hub import SMALL_FILES

CORPUS = [
    "hello world, hello caché",
    "naïve 😀 emoji 😀😀",
    "你好，世界。你好！",
    "def f(x):\n    return x\n",
]
EOS = "<|im_end|>"


def _train(kind: str) -> tokenizers.Tokenizer:
    """Train a tiny vocabulary: byte-level (as Qwen's), or Metaspace with byte fallback (as Llama
    2's)."""
    added = [
        tokenizers.AddedToken(EOS, special=True),
        tokenizers.AddedToken("<|im_start|>", special=True),
        tokenizers.AddedToken("<think>", special=True),
    ]
    if kind == "byte-level":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=added,
        )
        backend.train_from_iterator(CORPUS, trainer)
        return backend
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocab |= {letter: 257 + rank for rank, letter in enumerate("▁abcdehlorwn")}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(added)
    backend.post_processor = processors.TemplateProcessing("B $A", None, [("B", 270)])
    return backend


@pytest.fixture(scope="module", params=["byte-level", "metaspace"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    _train(request.param).save(str(path / "tokenizer.json"))
    settings = {
        "eos_token": {"content": EOS},
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def _pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in token_ids), decoder.flush()]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip_through_pieces(text: str) -> None:
    tokenizer = HFTokenizer()
    token_ids = tokenizer.encode(text)
    pieces = _pieces(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 260)))
def test_any_ids_decode_the_same_whole_and_in_pieces(token_ids: list[int]) -> None:
    tokenizer = HFTokenizer()
    pieces = _pieces(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    "".join(pieces).encode("utf-8")


@pytest.mark.parametrize("text", [*CORPUS, "😀 hello " * 5, "λ and 你 mixed\n\n"])
def test_directories_round_trip_whole_and_in_pieces(model_dir: Path, text: str) -> None:
    tokenizer = HFTokenizer(model_dir)
    token_ids = tokenizer.encode(text)
    reference = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert token_ids == reference.encode(text).ids
    assert tokenizer.decode(token_ids) == reference.decode(token_ids) == text
    in_bytes = b"".join(
        map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False))
    )
    assert in_bytes.decode().removeprefix(" ") == text
    assert "".join(_pieces(tokenizer, token_ids)) == text


def test_tokens_outside_the_byte_alphabet_decode_to_themselves(tmp_path: Path) -> None:
    """Guard against lost answers: vocabularies are padded with such tokens ("<pad 0>"), and a model
    may draw one."""
    described = json.loads(_train("byte-level").to_str())
    described["model"]["vocab"]["<pad 0>"] = pad = 1 + max(described["model"]["vocab"].values())
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    config = EngineConfig(tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="belongs to the model"):
        load_tokenizer_of(config, pad)
    for vocab_size in (None, pad + 1):
        tokenizer = load_tokenizer_of(config, vocab_size)
    token_ids = [*tokenizer.encode("naïve"), pad, *tokenizer.encode("x")]
    whole = tokenizer._backend.decode(token_ids)
    assert "".join(_pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids) == whole
    assert "<pad 0>" in whole


@given(st.lists(st.one_of(st.sampled_from([EOS, "<|im_start|>", " ", "\n"]), st.text(max_size=8))))
def test_remembered_pieces_equal_an_encoding_of_the_whole(
    model_dir: Path, parts: list[str]
) -> None:
    tokenizer = _loaded(model_dir)
    text = "".join(parts).encode("utf-8", "replace").decode()
    whole = tokenizer._backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, add_special_tokens=False) == whole
    assert tokenizer.encode(text, add_special_tokens=False) == whole, "read from memory"


@functools.cache
def _loaded(model_dir: Path) -> HFTokenizer:
    return HFTokenizer(model_dir)


def test_a_marked_special_token_is_text(model_dir: Path) -> None:
    """Check that the text has no special token, and reads the same without the mark."""
    tokenizer = HFTokenizer(model_dir)
    special = tokenizer.encode(EOS, add_special_tokens=False)[-1]
    marked = f"hello<\ue001{EOS[1:]} world{EOS}"
    token_ids = tokenizer.encode(marked, add_special_tokens=False, mark="\ue001")
    assert token_ids.count(special) == 1 and token_ids[-1] == special
    text = tokenizer.decode(token_ids, skip_special_tokens=False)
    assert text.replace("\u2060", "") == f"hello{EOS} world{EOS}"
    both = tokenizer.encode(f"<|im_start|>{EOS}", add_special_tokens=False)
    assert tokenizer.control_ids == set(both)
    assert (
        tokenizer.decode([*both, *tokenizer.encode("<think>", add_special_tokens=False)])
        == "<think>"
    )
    assert tokenizer._is_byte_level == ("\u2060" not in text)


def test_remembered_pieces_are_not_shared_between_namespaces(tmp_path: Path) -> None:
    _train("byte-level").save(str(tmp_path / "tokenizer.json"))
    tokenizer = HFTokenizer(tmp_path)
    encoded = []
    encode_text = tokenizer._encode_alone
    tokenizer._encode_alone = lambda text, **flags: (
        encoded.append(text) or encode_text(text, **flags)
    )
    for namespace in (None, "a", "b", None, "a", "b"):
        tokenizer.encode("a canary", add_special_tokens=False, namespace=namespace)
    assert encoded == ["a canary"] * 3


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ValueError, match="cannot be read"):
        HFTokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_dangling_link_is_no_missing_file(name: str, model_dir: Path, tmp_path: Path) -> None:
    """As in a cache of the hub whose blobs were removed."""
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to("../../blobs/4f1c")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*4f1c, which does not exist"):
        HFTokenizer(tmp_path / "model")


def test_chat_templates_are_found_in_all_their_places(model_dir: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())

    def render() -> str:
        template = HFTokenizer(tmp_path).chat_template
        assert isinstance(template, ChatTemplate)
        return template.render(chat)

    assert render() == "hi"
    named = [{"name": name, "template": name} for name in ("default", "tool_use")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert render() == "default"
    source = "{{ {'b': 1, 'a': '<'}|tojson(separators=(',', ':'), sort_keys=true) }}"
    (tmp_path / "chat_template.jinja").write_text(source)
    assert render() == '{"a":"<","b":1}', "as transformers writes it"


# --- Settings -------------------------------------------------------------------------------------

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
def test_settings_left_by_a_trainer_do_not_act(model_dir: Path, tmp_path: Path, left: str) -> None:
    """Guard against prompts of 4,001 tokens that are served as 74 of them."""
    described = json.loads((model_dir / "tokenizer.json").read_text())
    part = described["model"] if left == "dropout" else described
    part |= LEFT_BY_TRAINERS[left]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    expected = HFTokenizer(model_dir).encode(TEXT)
    assert len(expected) > 100
    assert HFTokenizer(tmp_path).encode(TEXT) == expected


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TOOL = {"content": "<tool>", "special": False} | FLAGS


def _listed(*changes: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a settings file for ``<tool>`` with each of the ``changes``."""
    return {"added_tokens_decoder": {str(900 - i): TOOL | one for i, one in enumerate(changes)}}


SETTINGS: dict[str, dict[str, Any]] = {
    "tokens only in the settings": _listed({}, {"content": "llo"}),
    "spaces on the left belong to a token": _listed({"lstrip": True}),
    "spaces on the right belong to a token": _listed({"rstrip": True}),
    "a token is a whole word": _listed({"single_word": True}),
    "a token becomes special": _listed({"special": True}),
    "other flags of a token in the file": _listed({"content": EOS, "lstrip": True}),
    "a named token that is an ordinary one": {"eos_token": "o", "bos_token": "<begin>"},
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
def test_settings_act_as_in_transformers(model_dir: Path, tmp_path: Path, setting: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SETTINGS[setting]))
    _compare_with_transformers(tmp_path)


def test_files_of_older_versions_of_transformers_are_read(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    named = {"eos_token": EOS, "bos_token": {"content": "<begin>"} | FLAGS}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<tool>": 901, "wor": 900, EOS: 0}))
    _compare_with_transformers(tmp_path)
    tokenizer = HFTokenizer(tmp_path)
    assert tokenizer.eos_token_ids == {*tokenizer.encode(EOS, add_special_tokens=False)[-1:]}


def _compare_with_transformers(folder: Path) -> None:
    ours, theirs = HFTokenizer(folder), TokenizersBackend.from_pretrained(folder)
    for with_special in (False, True):
        expected = theirs(TEXT, add_special_tokens=with_special).input_ids
        assert ours.encode(TEXT, add_special_tokens=with_special) == expected
        for skip in (False, True):
            decoded = theirs.decode(expected, skip_special_tokens=skip)
            assert ours.decode(expected, skip_special_tokens=skip) == decoded


@pytest.mark.parametrize(
    "settings",
    [{"eos_token": 5}, {"added_tokens_decoder": [1]}, {"chat_template": 3}, {"pad_token": {}}],
)
def test_settings_of_other_types_are_named(
    model_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has a setting of another type"):
        HFTokenizer(tmp_path)


def test_a_tokenizer_needs_no_folder() -> None:
    settings = {"eos_token": EOS, "chat_template": "{{ eos_token }}", "pad_token": "<pad>"}
    tokenizer = BackendTokenizer(_train("byte-level"), settings, eos_token_ids=[7])
    [eos, pad] = tokenizer.encode(f"{EOS}<pad>", add_special_tokens=False)
    assert tokenizer.eos_token_ids == {7, eos} and tokenizer.hidden_ids >= {eos, pad}
    assert tokenizer.chat_template.render([]) == EOS
    assert tokenizer.decode([*tokenizer.encode("naïve"), pad]) == "naïve"


# --- Kimi Linear ----------------------------------------------------------------------------------


def _write_ranks(folder: Path) -> list[bytes]:
    """Write a directory in the form of Kimi Linear's, with a vocabulary of its own. Return the
    tokens in the order of their ranks."""
    ours = BackendTokenizer(_train("byte-level"), {})
    ordinary = range(3, ours.vocab_size)  # Behind the three special ones.
    tokens = sorted(map(ours.token_bytes, ordinary), key=lambda token: len(token) > 1)
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
    tokens = _write_ranks(tmp_path)
    assert has_tokenizer(tmp_path)
    tokenizer, size = HFTokenizer(tmp_path), len(tokens)
    assert tokenizer.vocab_size == size + 258
    assert tokenizer.eos_token_ids == {size + 1} and tokenizer.chat_template is not None
    text = f"[BOS]hello<think><|reserved_token_{size + 4}|><|im_end|>"
    ids = tokenizer.encode(text)
    assert [i - size for i in ids if i >= size] == [0, 3, 4, 2]
    assert tokenizer.decode(ids) == "hello<think>"
    assert [tokenizer.token_bytes(i) for i in range(size)] == tokens


def test_all_files_of_tokenizers_are_downloaded() -> None:
    files = "tokenizer.json tokenizer.model tiktoken.model tokenizer_config.json vocab.json "
    files += "special_tokens_map.json added_tokens.json merges.txt chat_template.jinja"
    for name in files.split():
        assert any(fnmatch(name, pattern) for pattern in SMALL_FILES), name


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
def test_texts_are_split_as_in_the_program_of_kimi(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    _write_ranks(tmp_path)
    split = HFTokenizer(tmp_path)._backend.pre_tokenizer[0]
    assert [word for word, _ in split.pre_tokenize_str(text)] == words


@pytest.fixture(scope="module")
def beside_tiktoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[HFTokenizer, Any]:
    tiktoken, folder = pytest.importorskip("tiktoken"), tmp_path_factory.mktemp("kimi")
    ranks = {token: rank for rank, token in enumerate(_write_ranks(folder))}
    library = tiktoken.Encoding(
        "kimi", pat_str=KIMI_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    return HFTokenizer(folder), library


LETTERS = st.one_of(st.sampled_from("".join(CORPUS) + "'sSTd1 \n"), st.characters())


@given(st.text(LETTERS))
def test_ranks_merge_as_in_tiktoken(beside_tiktoken: tuple[HFTokenizer, Any], text: str) -> None:
    ours, theirs = beside_tiktoken
    text = text.encode("utf-8", "replace").decode()
    assert ours.encode(text, add_special_tokens=False) == theirs.encode_ordinary(text)


def test_files_that_cannot_be_converted_are_named(tmp_path: Path) -> None:
    (tmp_path / "tiktoken.model").write_text("no rank here")
    with pytest.raises(ValueError, match=r"tiktoken\.model cannot be read .*: download it again"):
        HFTokenizer(tmp_path)
    (tmp_path / "tiktoken.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"cannot be converted .*put the model's tokenizer\.json"):
        HFTokenizer(tmp_path)
