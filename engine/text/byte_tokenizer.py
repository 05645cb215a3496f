"""Tokenizer of the built-in model: the tokens of a text are its bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.text.chat_template import ChatTemplate
from engine.text.stream_decoders import ByteStreamDecoder, StreamDecoder
from engine.text.tokenizer import AS_PROMPT, SLICE, EncodeOptions

BUILTIN_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


class ByteTokenizer:
    """One token per byte, followed by five special tokens. Padded to 320 ids, which divide evenly.

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
        self._special = re.compile("|".join(map(re.escape, self.special_tokens)))
        self._longest = max(map(len, self.special_tokens))
        # As in Qwen's vocabulary, the thinking marks are single tokens and part of the text.
        self._hidden = frozenset({256, 257, 258})
        self.control_tokens = self.special_tokens[:3]

    def encode(self, text: str, how: EncodeOptions = AS_PROMPT) -> list[int]:
        token_ids: list[int] = []
        for piece in self._pieces(text):
            special = self._ids.get(piece)
            if special is None:
                if how.mark is not None:
                    piece = piece.replace(how.mark, "")
                # A lone surrogate (JSON's "\ud800") has no UTF-8 form, and the user would get the
                # error of strict encoding.
                raw = piece.encode("utf-8", "replace")
                for start in range(0, len(raw), SLICE):
                    token_ids.extend(raw[start : start + SLICE])
            else:
                token_ids.append(special)
        return token_ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Split ``text`` at its special tokens; the search processes one slice at a time."""
        done = 0
        for start in range(0, len(text), SLICE):
            end = start + SLICE
            for found in self._special.finditer(text, max(start, done), end + self._longest - 1):
                if found.start() < end:
                    yield text[done : found.start()]
                    yield found.group()
                    done = found.end()
        yield text[done:]

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

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        hidden = self._hidden if skip_special_tokens else frozenset()
        return ByteStreamDecoder(self.token_bytes, hidden)

    def as_json(self) -> None:
        return None
