"""Decoders from tokens to text. Text is returned only when later tokens cannot change it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder(Protocol):
    """Converts the tokens of one request to text."""

    def push(self, token_id: int) -> str:
        """Return the text that is certain with this token. Bytes of an unfinished character wait
        for the next token."""
        ...

    def flush(self) -> str:
        """Return the bytes held back as replacement characters, after the last token."""
        ...


class ByteStreamDecoder:
    """Decoder for vocabularies of byte strings: an incremental UTF-8 decoder. O(1) per token."""

    def __init__(self, token_bytes: Callable[[int], bytes], hidden: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._hidden else self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowStreamDecoder:
    """Decoder for other vocabularies, in which a token's text depends on its neighbours. Decodes a
    short window twice.

    The window starts one emission back, so that the boundary is decoded with its context. A
    character has at most four bytes: after four tokens, a replacement character is final and no
    longer held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_emitted = 0
        self._emitted_text = ""

    def push(self, token_id: int) -> str:
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
