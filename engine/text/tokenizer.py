"""Text to token ids and back: byte-level for the built-in model, tokenizer.json for Hugging Face
directories.

``decode`` and the pieces of a ``StreamDecoder`` give the same text, and no piece ever ends inside a
UTF-8 sequence.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.text.templates import ChatTemplate

if TYPE_CHECKING:
    import tokenizers

BUILTIN_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
SLICE = 65_536
"""Bytes or ids handled at a time, so that other threads have a turn between."""
REMEMBERED_BYTES = 32 << 20
"""Of stretches of text between special tokens and of their ids, which are remembered."""
ENTRY_BYTES = 256
"""What a remembered stretch takes beside its text and its ids."""
WORD_JOINER = "\u2060"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder(Protocol):
    """Turns tokens into text as they come. One per request."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; bytes of an unfinished character wait for
        the next."""
        ...

    def flush(self) -> str:
        """What still waited, as replacement characters: there will be no more tokens."""
        ...


class Tokenizer(Protocol):
    """What the engine and the server need of a tokenizer."""

    vocab_size: int
    """One more than the highest id that there is: a model's own table may be longer."""
    eos_token_ids: frozenset[int]
    """Ids that end an answer."""
    special_tokens: tuple[str, ...]
    """Strings that always become one token and split the text around them: the text on either side
    may be encoded alone."""
    control_tokens: tuple[str, ...]
    """Special tokens that no text has: what begins and ends a turn. (``<think>`` is a token, and
    part of the text.)"""
    chat_template: ChatTemplate | None

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        mark: str | None = None,
        namespace: Hashable = None,
    ) -> list[int]:
        """Ids of ``text``; with ``add_special_tokens`` also the ones the model wants around it (a
        BOS, say). O(len(text)).

        ``mark`` is a character that is no part of the text: it only keeps apart what is on either
        side of it. What is remembered to be quicker the next time is remembered for one
        ``namespace``: another can not tell from the time.
        """
        ...

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; ids without text (padding of the vocabulary) give none, broken
        bytes give U+FFFD."""
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
        self.control_tokens = self.special_tokens[:3]

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        mark: str | None = None,
        namespace: Hashable = None,
    ) -> list[int]:
        token_ids: list[int] = []
        for piece in self._split.split(text):
            special = self._ids.get(piece)
            if special is None:
                if mark is not None:
                    piece = piece.replace(mark, "")
                # A lone surrogate (JSON's "\ud800") has no UTF-8; the strict error would be the
                # user's to see.
                raw = piece.encode("utf-8", "replace")
                for start in range(0, len(raw), SLICE):
                    token_ids.extend(raw[start : start + SLICE])
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
    """A ``tokenizer.json`` with the facts of its directory: template, specials, what ends an
    answer.

    Uses the ``tokenizers`` library alone; ``transformers`` is asked only where a directory has no
    ``tokenizer.json`` and must be converted.
    """

    def __init__(self, model_dir: Path) -> None:
        self._backend = _load_backend(model_dir)
        settings = _read_json(model_dir / "tokenizer_config.json")
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
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
        # A special token is a wall: the texts on either side are encoded alone. Not so where a
        # text's first word is special.
        has_walls = self._is_byte_level and not _adds_prefix_space(described["pre_tokenizer"])
        self._walls = _pattern(self.special_tokens) if has_walls else None
        self.control_tokens = tuple(
            token.content for token in added.values() if token.special and len(token.content) > 1
        )
        self._pieces = PieceMemory(REMEMBERED_BYTES)

    def _find_eos(self, model_dir: Path, settings: dict[str, Any]) -> frozenset[int]:
        """What the model names, and the tokenizer's own end token."""
        found = named_eos(model_dir)
        own = self._backend.token_to_id(_content(settings.get("eos_token")) or "")
        return found if own is None else found | {own}

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        mark: str | None = None,
        namespace: Hashable = None,
    ) -> list[int]:
        """As the protocol says. A chat's pieces are remembered, so that its next turn costs only
        what is new.

        Where a text's first word is special, so that nothing can be encoded alone, a ``mark``
        becomes a word joiner, which is not seen.
        """
        clean = text.encode("utf-8", "replace").decode("utf-8")
        if self._walls is None or add_special_tokens:
            if mark is not None:
                clean = clean.replace(mark, WORD_JOINER)
            return self._encode_alone(clean, add_special_tokens)
        token_ids: list[int] = []
        for piece in self._walls.split(clean):
            for part in piece.split(mark) if mark is not None else (piece,):
                if part:
                    token_ids.extend(self._encode_piece(part, namespace))
        return token_ids

    def _encode_piece(self, piece: str, namespace: Hashable) -> array[int]:
        known = self._pieces.get(namespace, piece)
        if known is None:
            known = array("i", self._encode_alone(piece, add_special_tokens=False))
            self._pieces.put(namespace, piece, known)
        return known

    def _encode_alone(self, text: str, add_special_tokens: bool) -> list[int]:
        """A long text as a batch of one: the library then lets other threads run meanwhile."""
        if len(text) > SLICE:
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        else:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

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
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[letter] for letter in token)
        except KeyError:  # Not of the byte alphabet: it stands for itself, as in HF's decoder.
            return token.encode()

    def stream_decoder(self) -> StreamDecoder:
        if self._is_byte_level:
            return ByteStreamDecoder(self.token_bytes, self._hidden)
        return WindowStreamDecoder(self.decode)


class PieceMemory:
    """Ids of stretches of text, the latest used of each namespace, in ``limit_bytes`` together.
    Safe from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._known: OrderedDict[tuple[Hashable, str], array[int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, namespace: Hashable, piece: str) -> array[int] | None:
        with self._lock:
            known = self._known.get((namespace, piece))
            if known is not None:
                self._known.move_to_end((namespace, piece))
            return known

    def put(self, namespace: Hashable, piece: str, token_ids: array[int]) -> None:
        """Remember ``token_ids``, and forget what was not used for longest. One that would take a
        quarter is not kept."""
        size = _size(piece, token_ids)
        if size > self._limit_bytes // 4:
            return
        with self._lock:
            if (namespace, piece) in self._known:
                return
            self._known[namespace, piece] = token_ids
            self.num_bytes += size
            while self.num_bytes > self._limit_bytes:
                (_, oldest), ids = self._known.popitem(last=False)
                self.num_bytes -= _size(oldest, ids)

    def check(self) -> None:
        """AssertionError: the books are wrong. O(pieces)."""
        sizes = [_size(piece, ids) for (_, piece), ids in self._known.items()]
        assert sum(sizes) == self.num_bytes <= self._limit_bytes


def _size(piece: str, token_ids: array[int]) -> int:
    return sys.getsizeof(piece) + sys.getsizeof(token_ids) + ENTRY_BYTES


class ByteStreamDecoder:
    """For vocabularies whose tokens are byte strings: an incremental UTF-8 decoder over them. O(1)
    a token."""

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
    """For the other vocabularies, where a token's text depends on its neighbours: decodes a short
    window twice.

    The window starts one emission back, so that the joint is decoded with its context. A character
    has at most four bytes: after that many tokens a replacement character is what the tokens mean,
    and no longer waits.
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


def named_eos(model_dir: Path) -> frozenset[int]:
    """The end tokens that generation_config.json names, or else config.json."""
    config = _read_json(model_dir / "config.json")
    candidates = (
        _read_json(model_dir / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        config.get("text_config", {}).get("eos_token_id"),
    )
    named: int | list[int] = next((ids for ids in candidates if ids is not None), [])
    return frozenset({named} if isinstance(named, int) else named)


def has_tokenizer(model_dir: Path) -> bool:
    """Whether there is a tokenizer.json, or something that one can be made of."""
    return any(
        found
        for form in ("tokenizer.json", "tokenizer.model", "vocab*")
        for found in model_dir.glob(form)
    )


def _load_backend(model_dir: Path) -> tokenizers.Tokenizer:
    import tokenizers

    path = model_dir / "tokenizer.json"
    if path.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises nothing narrower.
            raise ValueError(f"{path} is no tokenizer ({error}): download it again.") from None
    if not has_tokenizer(model_dir):
        raise FileNotFoundError(
            f"No tokenizer in {model_dir}: put the model's tokenizer.json there."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True).backend_tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty where there is no such file. ValueError names a file that is
    not JSON."""
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
    """Matches any of ``words``, the longest first, and keeps it when splitting; None where there
    are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if words else None


def _letters_of_bytes() -> dict[str, int]:
    """The letters that byte-level BPE writes its bytes with: printable ones stand for themselves,
    the rest from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _letters_of_bytes()
