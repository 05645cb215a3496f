"""What the engine and the server need of a tokenizer.

``decode`` and the pieces of a ``StreamDecoder`` give the same text, and no piece ever ends inside a
UTF-8 sequence.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from engine.text.stream_decoders import StreamDecoder

if TYPE_CHECKING:
    from engine.text.chat_template import ChatTemplate

SLICE = 65_536
"""Bytes or ids handled at a time, so that other threads have a turn between."""


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How a text is read."""

    add_special_tokens: bool = True
    """Give also the tokens that the model wants around a text (a BOS, say)."""
    mark: str | None = None
    """A character that is no part of the text: it only keeps apart what is on either side of
    it."""
    namespace: Hashable = None
    """What is remembered to be quicker the next time is remembered for one namespace: another can
    not tell from the time."""


AS_PROMPT = EncodeOptions()


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

    def encode(self, text: str, how: EncodeOptions = AS_PROMPT) -> list[int]:
        """Ids of ``text``. O(len(text))."""
        ...

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; ids without text (padding of the vocabulary) give none, broken
        bytes give U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, specials included."""
        ...

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder: ...

    def as_json(self) -> str | None:
        """What a ``tokenizer.json`` says; None: its tokens are bytes, and that is all."""
        ...
