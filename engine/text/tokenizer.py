"""Text to token ids and back: byte-level for the built-in model, tokenizer.json for Hugging Face directories.

``decode`` and the pieces of a ``StreamDecoder`` give the same text, and no piece ever ends inside a UTF-8 sequence.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.text.templates import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

BUILTIN_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
CACHED_PIECES = 8192
"""Stretches of text between special tokens whose ids are remembered."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder(Protocol):
    """Turns tokens into text as they come. One per request."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; bytes of an unfinished character wait for the next."""
        ...

    def flush(self) -> str:
        """What still waited, as replacement characters: there will be no more tokens."""
        ...


class Tokenizer(Protocol):
    """What the engine and the server need of a tokenizer."""

    vocab_size: int
    """Ids the model may be given are below it."""
    eos_token_ids: frozenset[int]
    """Ids that end an answer."""
    special_tokens: tuple[str, ...]
    """Strings that always become one token and split the text around them: the text on either side may be encoded alone."""
    chat_template: ChatTemplate | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; with ``add_special_tokens`` also the ones the model wants around it (a BOS, say). O(len(text))."""
        ...

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; ids without text (padding of the vocabulary) give none, broken bytes give U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, specials included."""
        ...

    def stream_decoder(self) -> StreamDecoder: ...


class ByteTokenizer:
    """One token a byte, five specials after them. 320 ids, so that tables of them divide well.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("hé<|im_end|>")
    [104, 195, 169, 258]
    >>> tokenizer.decode([104, 195, 169, 258])
    'hé'
    """

    vocab_size: int = 320
    special_tokens: tuple[str, ...] = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
    )
    eos_token_ids: frozenset[int] = frozenset({256, 258})

    def __init__(self) -> None:
        self.chat_template: ChatTemplate | None = ChatTemplate(
            BUILTIN_TEMPLATE.read_text(encoding="utf-8"), {"eos_token": "<|im_end|>"}
        )
        self._ids = {text: 256 + rank for rank, text in enumerate(self.special_tokens)}
        self._split = re.compile("(" + "|".join(map(re.escape, self.special_tokens)) + ")")
        # As in Qwen's vocabulary, the thinking marks are tokens of their own but part of the text.
        self._hidden = frozenset({256, 257, 258})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        token_ids: list[int] = []
        for piece in self._split.split(text):
            special = self._ids.get(piece)
            if special is None:
                # A lone surrogate (JSON's "\ud800") has no UTF-8; the strict error would be the user's to see.
                token_ids.extend(piece.encode("utf-8", "replace"))
            else:
                token_ids.append(special)
        return token_ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        hidden = self._hidden if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in hidden).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes((token_id,))
        rank = token_id - 256
        return self.special_tokens[rank].encode() if rank < len(self.special_tokens) else b""

    def stream_decoder(self) -> StreamDecoder:
        return ByteStreamDecoder(self.token_bytes, self._hidden)


class HFTokenizer:
    """A ``tokenizer.json`` with the facts of its directory: template, specials, what ends an answer.

    Uses the ``tokenizers`` library alone; ``transformers`` is asked only where a directory has no ``tokenizer.json`` and
    must be converted.
    """

    def __init__(self, model_dir: Path) -> None:
        self._backend = _load_backend(model_dir)
        settings = _read_json(model_dir / "tokenizer_config.json")
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size = max(self._backend.get_vocab_size(with_added_tokens=True), *added, 0) + 1
        self.special_tokens = tuple(
            token.content
            for token in added.values()
            if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        )
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._hidden = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_ids = self._find_eos(model_dir, settings)
        self.chat_template = _find_template(model_dir, settings)
        described = json.loads(self._backend.to_str())
        self._is_byte_level = (described["decoder"] or {}).get("type") == "ByteLevel"
        # A special token is a wall: the texts on either side are encoded alone. Not so where a text's first word is special.
        has_walls = self._is_byte_level and not _adds_prefix_space(described["pre_tokenizer"])
        self._walls = _pattern(self.special_tokens) if has_walls else None
        self._encode_piece = lru_cache(maxsize=CACHED_PIECES)(self._encode_between)

    def _find_eos(self, model_dir: Path, settings: dict[str, Any]) -> frozenset[int]:
        """What generation_config.json says, or else config.json, and the tokenizer's own end token with either."""
        config = _read_json(model_dir / "config.json")
        candidates = (
            _read_json(model_dir / "generation_config.json").get("eos_token_id"),
            config.get("eos_token_id"),
            config.get("text_config", {}).get("eos_token_id"),
        )
        named: int | list[int] = next((ids for ids in candidates if ids is not None), [])
        found = {named} if isinstance(named, int) else set(named)
        own = self._backend.token_to_id(_content(settings.get("eos_token")) or "")
        return frozenset(found if own is None else found | {own})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As the protocol says. A chat's pieces are remembered, so that its next turn costs only what is new."""
        clean = text.encode("utf-8", "replace").decode("utf-8")
        if self._walls is None or add_special_tokens:
            ids: list[int] = self._backend.encode(clean, add_special_tokens=add_special_tokens).ids
            return ids
        return list(
            itertools.chain.from_iterable(
                self._encode_piece(piece) for piece in self._walls.split(clean) if piece
            )
        )

    def _encode_between(self, piece: str) -> array[int]:
        return array("i", self._backend.encode(piece, add_special_tokens=False).ids)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        if not self._is_byte_level:
            return str(self._backend.decode(list(token_ids), skip_special_tokens))
        hidden = self._hidden if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in hidden).decode(
            "utf-8", "replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        if not self._is_byte_level:
            return str(self._backend.decode([token_id], False)).encode()
        token = self._backend.id_to_token(token_id)
        return bytes(_BYTE_OF[letter] for letter in token) if token is not None else b""

    def stream_decoder(self) -> StreamDecoder:
        if self._is_byte_level:
            return ByteStreamDecoder(self.token_bytes, self._hidden)
        return WindowStreamDecoder(self.decode)


class ByteStreamDecoder:
    """For vocabularies whose tokens are byte strings: an incremental UTF-8 decoder over them. O(1) a token."""

    def __init__(self, token_bytes: Callable[[int], bytes], hidden: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._utf8.decode(
            b"".join(self._token_bytes(i) for i in token_ids if i not in self._hidden)
        )

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowStreamDecoder:
    """For the other vocabularies, where a token's text depends on its neighbours: decodes a short window twice.

    The window starts one emission back, so that the joint is decoded with its context. A character has at most four
    bytes: after that many tokens a replacement character is what the tokens mean, and no longer waits.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_emitted = 0
        self._emitted_text = ""

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join(map(self._push_one, token_ids))

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        waits = text.endswith(REPLACEMENT) and len(self._window) - self._num_emitted < 4
        return "" if waits or len(text) <= len(self._emitted_text) else self._emit(text)

    def _emit(self, text: str) -> str:
        new = text[len(self._emitted_text) :]
        self._window = self._window[self._num_emitted :]
        self._num_emitted = len(self._window)
        self._emitted_text = self._decode(self._window)
        return new

    def flush(self) -> str:
        text = self._decode(self._window)
        return self._emit(text) if len(text) > len(self._emitted_text) else ""


def load_tokenizer(model_dir: str | Path | None) -> Tokenizer:
    """The tokenizer of a Hugging Face directory; of the built-in model where None.

    FileNotFoundError names the directory that has none.
    """
    return ByteTokenizer() if model_dir is None else HFTokenizer(Path(model_dir))


def _load_backend(model_dir: Path) -> tokenizers.Tokenizer:
    import tokenizers

    path = model_dir / "tokenizer.json"
    if path.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(f"{path} is no tokenizer ({error}): download it again.") from None
    if not any(model_dir.glob("tokenizer.model")) and not any(model_dir.glob("vocab*")):
        raise FileNotFoundError(
            f"No tokenizer in {model_dir}: put the model's tokenizer.json there."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True).backend_tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty where there is no such file. ValueError names a file that is not JSON."""
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again.") from error
    return content


def _find_template(model_dir: Path, settings: dict[str, Any]) -> ChatTemplate | None:
    path = model_dir / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("default")
    if source is None:
        return None
    specials = {
        name: _content(settings.get(name)) or ""
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    return ChatTemplate(source, specials)


def _content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a special token, which settings write as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _adds_prefix_space(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return any(part.get("add_prefix_space", False) for part in parts)


def _pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    """Matches any of ``words``, the longest first, and keeps it when splitting; None where there are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if words else None


def _letters_of_bytes() -> dict[str, int]:
    """The letters that byte-level BPE writes its bytes with: printable ones stand for themselves, the rest from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _letters_of_bytes()
