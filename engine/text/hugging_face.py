"""Tokenizer of a Hugging Face directory, with its chat template, special tokens and end tokens."""

from __future__ import annotations

import json
import re
import sys
from array import array
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import BUILTIN_DIR
from engine.text.answers import MARKS
from engine.text.bounded_memory import BoundedMemory
from engine.text.tokenizer import (
    AS_PROMPT,
    ByteStreamDecoder,
    ChatTemplate,
    EncodeOptions,
    StreamDecoder,
    WindowStreamDecoder,
    any_of,
)

if TYPE_CHECKING:
    import tokenizers


ENTRY_BYTES = 256
"""Approximate size of a cache entry without its text and ids."""
REMEMBERED_BYTES = 32 << 20
"""Limit of the cache of text pieces between special tokens, with their ids. A piece that needs more
than a quarter of it is not stored."""
LONG = 65_536
"""Minimum number of characters of a long text."""
WORD_JOINER = "\u2060"
_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
"""Token of one byte in vocabularies that are not byte-level."""


class HFTokenizer:
    """A ``tokenizer.json`` with the template, special tokens and end tokens of its directory.

    Uses only the ``tokenizers`` library. ``transformers`` is used only for a directory without a
    ``tokenizer.json``, to convert its files.
    """

    def __init__(self, model_dir: Path = BUILTIN_DIR, max_ids: int | None = None) -> None:
        """Load the files of ``model_dir``. ``max_ids`` is the number of ids of the model. Raises
        FileNotFoundError if there is no tokenizer, and ValueError if it has more ids."""
        self._backend = _load_backend(model_dir)
        settings = read_json(model_dir / "tokenizer_config.json")
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        plain = self._backend.get_vocab(with_added_tokens=False)
        # The model's table may be padded, and a few added tokens past its end are never used.
        if max_ids is not None and (num_ids := max(plain.values(), default=-1) + 1) > max_ids:
            raise ValueError(
                f"the tokenizer of {model_dir} has {num_ids:,} token ids, and the model has "
                f"{max_ids:,}: use the tokenizer that belongs to the model."
            )
        self.special_tokens = tuple(
            token.content
            for token in added.values()
            if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        )
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._hidden = frozenset(
            token_id
            for token_id, token in added.items()
            if token.special and token.content not in MARKS
        )
        own_eos = self._backend.token_to_id(_content(settings.get("eos_token")) or "")
        self.eos_token_ids = named_eos(model_dir) | (set() if own_eos is None else {own_eos})
        self.chat_template = _find_template(model_dir, settings)
        described = json.loads(self._backend.to_str())
        self._is_byte_level = (described["decoder"] or {}).get("type") == "ByteLevel"
        # Texts on either side of a special token are encoded independently, except by a tokenizer
        # that treats the first word of a text differently.
        splitter = described["pre_tokenizer"] or {}
        parts = splitter.get("pretokenizers", [splitter])
        adds_space = any(part.get("add_prefix_space", False) for part in parts)
        has_walls = self._is_byte_level and not adds_space
        # With a group, so that splitting keeps the special tokens.
        walls = f"({any_of(self.special_tokens).pattern})"
        self._walls = re.compile(walls) if has_walls and self.special_tokens else None
        hidden = (self._added[token_id] for token_id in self._hidden)
        self.control_tokens = tuple(text for text in hidden if len(text) > 1)
        self._pieces = BoundedMemory[tuple[Hashable, str], "array[int]"](REMEMBERED_BYTES)
        """Token ids of text pieces, by namespace."""

    def encode(self, text: str, how: EncodeOptions = AS_PROMPT) -> list[int]:
        """Return the ids of ``text``; see ``Tokenizer``. The pieces of a chat are cached, so its
        next turn costs only the new text.

        If the tokenizer treats the first word of a text differently, pieces cannot be encoded
        independently. A mark then becomes a word joiner, which is invisible.
        """
        clean = text.encode("utf-8", "replace").decode("utf-8")
        if self._walls is None or how.add_special_tokens:
            if how.mark is not None:
                clean = clean.replace(how.mark, WORD_JOINER)
            return self._encode_alone(clean, how.add_special_tokens)
        token_ids: list[int] = []
        for piece in self._walls.split(clean):
            for part in piece.split(how.mark) if how.mark is not None else (piece,):
                if not part:
                    continue
                known = self._pieces.get((how.namespace, part))
                if known is None:
                    known = array("i", self._encode_alone(part, add_special_tokens=False))
                    size = sys.getsizeof(part) + sys.getsizeof(known) + ENTRY_BYTES
                    if size <= self._pieces.limit_bytes // 4:
                        self._pieces.put((how.namespace, part), known, size)
                token_ids.extend(known)
        return token_ids

    def _encode_alone(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode one text. A long text is encoded as a batch of one, because the library then lets
        other threads run."""
        if len(text) > LONG:
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        else:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        hidden = self._hidden if skip_special_tokens else frozenset()
        shown = [i for i in token_ids if i not in hidden]
        if not self._is_byte_level:
            return str(self._backend.decode(shown, skip_special_tokens=False))
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if not self._is_byte_level:
            if byte := _FALLBACK.fullmatch(token):
                return bytes.fromhex(byte[1])
            # After another token, because a text loses the space at its beginning.
            alone, twice = (self._backend.decode([token_id] * n, False) for n in (1, 2))
            return str(twice[len(alone) :]).encode()
        try:
            return bytes(_BYTE_OF[letter] for letter in token)
        except KeyError:  # Not in the byte alphabet: kept as it is, as in HF's decoder.
            return token.encode()

    def stream_decoder(
        self, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> StreamDecoder:
        if self._is_byte_level:
            hidden = self._hidden if skip_special_tokens else frozenset()
            return ByteStreamDecoder(self.token_bytes, hidden)
        decode = partial(self.decode, skip_special_tokens=skip_special_tokens)
        return WindowStreamDecoder(decode, before)

    def as_json(self) -> str:
        described: str = self._backend.to_str()
        return described


def named_eos(model_dir: Path) -> frozenset[int]:
    """Return the end tokens of generation_config.json, or else of config.json."""
    config = read_json(model_dir / "config.json")
    candidates = (
        read_json(model_dir / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        (config.get("text_config") or {}).get("eos_token_id"),
    )
    named: int | list[int] = next((ids for ids in candidates if ids is not None), [])
    return frozenset({named} if isinstance(named, int) else named)


def has_tokenizer(model_dir: Path) -> bool:
    """Return True if there is a tokenizer.json, or a file that it can be converted from."""
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
            raise ValueError(
                f"{path} cannot be read as a tokenizer ({error}): download it again."
            ) from None
    if not has_tokenizer(model_dir):
        raise FileNotFoundError(
            f"No tokenizer in {model_dir}: put the model's tokenizer.json there."
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True).backend_tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in ``path``, or {} if the file does not exist. Raises ValueError if the
    file is not an object in JSON."""
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not an object in JSON: download it again.")
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
    """Return the text of a special token, which settings write as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _letters_of_bytes() -> dict[str, int]:
    """Map the letters of byte-level BPE to bytes: printable bytes stand for themselves, the others
    start at U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _letters_of_bytes()
