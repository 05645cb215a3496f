"""Tokenizers in GGUF files: vocabulary, template, end tokens and defaults of sampling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.text.tokenizer import BackendTokenizer, Settings
from engine.text.tokenizer_files import (
    CONTRACTIONS,
    KIMI_WORDS,
    SPACES,
    cased,
    merges_into,
    read_json,
)
from hybridcache.geometry.gguf import GgufFile, gguf_file
from hybridcache.geometry.sizes import ModelError

if TYPE_CHECKING:
    import tokenizers

PREFIX = "tokenizer.ggml."
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5
"""Types of tokens. 1 is a normal one, 6 a byte."""


def _words(letters: str, digits: str, others: str) -> str:
    """Return the pattern of GPT-4, with other sets of ``letters``."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?{letters}+"
    return rf"{CONTRACTIONS}|{word}|{digits}| ?[^\s{others}\p{{N}}]+[\r\n]*|{SPACES}"


LLAMA3 = _words(r"\p{L}", r"\p{N}{1,3}", r"\p{L}")
QWEN2 = _words(r"\p{L}", r"\p{N}", r"\p{L}")
QWEN35 = _words(r"[\p{L}\p{M}]", r"\p{N}", r"\p{L}\p{M}")
GPT4O = cased(r"\p{N}{1,3}", r"\r\n/", end=f"{CONTRACTIONS}?")
TEKKEN = cased(r"\p{N}", r"\r\n/")
GPT2, DIGITS = "", r"\p{N}"
PATTERNS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "lfm2", "falcon3", "falcon-h1"), LLAMA3),
    **dict.fromkeys(("pixtral", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "olmo", "granite-docling"), GPT2),
    **dict.fromkeys(("refact", "starcoder", "command-r", "smollm"), DIGITS),
    "qwen35": QWEN35,
    "tekken": TEKKEN,
    "kimi-k2": KIMI_WORDS,
}
"""Patterns of the words in which BPE merges, by ``tokenizer.ggml.pre``."""
WHOLE = {pre for pre, pattern in PATTERNS.items() if pattern is LLAMA3 or pattern is TEKKEN}
WHOLE -= {"dbrx", "smaug-bpe"}
"""Kinds in which a word that is a token is not merged."""
WITH_BOS = WHOLE
"""Kinds that put a BOS before a text unless the file says otherwise."""
NORMALIZED = "qwen2", "qwen35"
"""Kinds with texts in Unicode's form NFC, which GGUF does not say."""
ENDS = (
    *("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
    *("<end_of_turn>", "<EOT>", "_<EOT>", "[EOT]", "<|return|>", "<|call|>"),
)
"""Control tokens that end an answer, whether the file names them or not."""
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys in ``general.sampling``, and their names in a generation_config.json."""


class GgufTokenizer(NamedTuple):
    """Arguments of ``BackendTokenizer``."""

    backend: tokenizers.Tokenizer
    settings: Settings
    """Special tokens and ``chat_template``, as in a tokenizer_config.json."""
    eos_token_ids: frozenset[int]


def read_tokenizer(file: GgufFile) -> GgufTokenizer | None:
    """Return the tokenizer of a file, or None if it has none. Raises ModelError for an unknown kind
    and for a vocabulary that cannot be used. Takes about a second for 150,000 tokens."""
    kind = str(file.metadata.get(f"{PREFIX}model", "none"))
    if kind in ("none", "no_vocab"):
        return None
    reader = _Reader(file)
    if kind not in ("gpt2", "llama"):
        raise reader.refusal(
            f"is of the kind {kind[:40]!r}, which is not supported: name the directory of the "
            "original one with --tokenizer"
        )
    try:
        backend = reader.byte_level() if kind == "gpt2" else reader.sentence_pieces()
    except ModelError:
        raise
    except Exception as error:  # The library has no class of its own.
        raise reader.refusal(
            f"cannot be used ({str(error)[:200]}): download the file again"
        ) from None
    return GgufTokenizer(backend, reader.settings(), reader.ends())


def load_tokenizer(model: Path, max_ids: int | None) -> BackendTokenizer | None:
    """Load the tokenizer of the GGUF file that ``model`` names, or None if it has none. Raises
    ValueError."""
    file = gguf_file(model)
    found = None if file is None else read_tokenizer(file)
    if found is None:
        return None
    backend, settings, eos = found
    return BackendTokenizer(
        backend, settings, eos_token_ids=eos, max_ids=max_ids, source=str(model)
    )


def read_generation_config(model: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file with the defaults of sampling that a model recommends, and the defaults: of a
    generation_config.json, or of a GGUF file."""
    if (file := gguf_file(model)) is None:
        path = model / "generation_config.json"
        return path, read_json(path)
    named = {name: file.metadata.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    return model, {name: of for name, of in named.items() if isinstance(of, int | float)}


class _Reader:
    """Vocabulary of a file."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._tokens = self._texts("tokens")
        types = file.metadata.get(f"{PREFIX}token_type")
        if not isinstance(types, np.ndarray) or len(types) != len(self._tokens):
            types = np.ones(len(self._tokens), np.int32)
        self._types: list[int] = types.tolist()
        self._vocabulary: dict[str, int] = {}
        for token_id, (token, type) in enumerate(zip(self._tokens, self._types, strict=True)):
            if token and type != UNUSED:
                self._vocabulary.setdefault(token, token_id)

    def refusal(self, reason: str) -> ModelError:
        return ModelError(f"the tokenizer in {self._file.path.name} {reason}.")

    def _texts(self, key: str, default: list[str] | None = None) -> list[str]:
        found = self._file.metadata.get(PREFIX + key, default)
        if not isinstance(found, list):
            raise self.refusal(f"has no list {PREFIX}{key}")
        return found

    def _flag(self, key: str, default: bool) -> bool:
        found = self._file.metadata.get(PREFIX + key, default)
        return bool(found) if isinstance(found, int) else default

    def _id(self, name: str) -> int | None:
        """Return the id of a special token, or None."""
        found = self._file.metadata.get(f"{PREFIX}{name}_token_id")
        return found if isinstance(found, int) and 0 <= found < len(self._tokens) else None

    def settings(self) -> Settings:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        found = {name: self._id(own) for name, own in names.items()}
        settings: Settings = {
            f"{name}_token": self._tokens[i] for name, i in found.items() if i is not None
        }
        template = self._file.metadata.get("tokenizer.chat_template")
        return settings | ({"chat_template": template} if isinstance(template, str) else {})

    def ends(self) -> frozenset[int]:
        named = {self._id(name) for name in ("eos", "eot", "eom")}
        named |= {i for i in map(self._vocabulary.get, ENDS) if i and self._types[i] == CONTROL}
        return frozenset(i for i in named if i is not None)

    def byte_level(self) -> tokenizers.Tokenizer:
        """Return BPE on bytes."""
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        pre = str(self._file.metadata.get(f"{PREFIX}pre", "default"))
        pattern = PATTERNS.get(pre)
        if pattern is None:
            raise self.refusal(
                f"splits words as {pre[:40]!r} does, which is not supported: name the directory of "
                "the original one with --tokenizer"
            )
        merges = [merge[1:].partition(" ") for merge in self._texts("merges", [])]
        firsts = (merge[:1] for merge in self._texts("merges", []))
        pairs = [(f + left, right) for f, (left, _, right) in zip(firsts, merges, strict=True)]
        model = models.BPE(self._vocabulary, pairs, ignore_merges=pre in WHOLE)
        backend = Tokenizer(model)
        if pre in NORMALIZED:
            backend.normalizer = normalizers.NFC()
        level = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=pattern in (GPT2, DIGITS)
        )
        first = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else None
        backend.pre_tokenizer = pre_tokenizers.Sequence([*([first] if first else []), level])
        backend.decoder = decoders.ByteLevel()
        return self._with_special(backend, adds_bos=pre in WITH_BOS)

    def sentence_pieces(self) -> tokenizers.Tokenizer:
        """Return BPE on characters with spaces as U+2581 and bytes for unknown characters."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        unknown = self._id("unknown")
        backend = Tokenizer(
            models.BPE(
                self._vocabulary,
                list(self._pairs()),
                unk_token=None if unknown is None else self._tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        space, is_prefixed = "\u2581", self._flag("add_space_prefix", True)
        spaces = normalizers.Replace(" ", space)
        prefix = [normalizers.Prepend(space)] if is_prefixed else []
        backend.normalizer = normalizers.Sequence([*prefix, spaces])
        steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
        steps += [decoders.Strip(" ", 1, 0)] if is_prefixed else []
        backend.decoder = decoders.Sequence(steps)
        return self._with_special(backend, adds_bos=True)

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Yield merges: the best score first, then the lowest id."""
        scores = self._file.metadata.get(f"{PREFIX}scores")
        if not isinstance(scores, np.ndarray) or len(scores) != len(self._tokens):
            raise self.refusal(f"has no {PREFIX}scores for all tokens")
        order = np.lexsort((np.arange(len(scores)), -scores.astype(np.float64)))
        for token_id in order.tolist():
            token = self._tokens[token_id]
            if self._types[token_id] in (UNKNOWN, CONTROL, USER_DEFINED, UNUSED):
                continue
            yield from merges_into(token, self._vocabulary)

    def _with_special(
        self, backend: tokenizers.Tokenizer, *, adds_bos: bool
    ) -> tokenizers.Tokenizer:
        """Add the tokens that split a text, and those around a text."""
        from tokenizers import AddedToken, processors

        added = [
            AddedToken(token, special=type == CONTROL, normalized=False)
            for type, token in zip(self._types, self._tokens, strict=True)
            if type in (CONTROL, USER_DEFINED) and token
        ]
        backend.add_tokens(added)
        around: list[str] = ["$A"]
        listed = []
        for name, default in (("bos", adds_bos), ("eos", False)):
            token_id = self._id(name)
            if token_id is not None and self._flag(f"add_{name}_token", default):
                around = [name, *around] if name == "bos" else [*around, name]
                listed.append({"id": name, "ids": [token_id], "tokens": [self._tokens[token_id]]})
        if listed:
            backend.post_processor = processors.TemplateProcessing(
                single=around, special_tokens=listed
            )
        return backend
