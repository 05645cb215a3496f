"""Interface of tokenizers, as the engine and the server use it.

``decode`` and the pieces of a ``StreamDecoder`` give the same text, and no piece ends inside a
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
"""Number of bytes or ids processed at a time, so that other threads can run in between."""


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """Options of ``Tokenizer.encode``."""

    add_special_tokens: bool = True
    """Also return the tokens that the model expects around a text, such as a BOS."""
    mark: str | None = None
    """Character that is not part of the text; it separates the text on either side."""
    namespace: Hashable = None
    """Namespace of cached pieces. The time of encoding does not reveal pieces of other
    namespaces."""


AS_PROMPT = EncodeOptions()


class Tokenizer(Protocol):
    """Interface of tokenizers."""

    vocab_size: int
    """Highest id plus one. The model's own table may be longer."""
    eos_token_ids: frozenset[int]
    """Ids that end an answer."""
    special_tokens: tuple[str, ...]
    """Strings that always become one token and split the text around them. The text on either side
    can be encoded independently."""
    control_tokens: tuple[str, ...]
    """Special tokens that never occur in a text, such as those at the beginning and end of a turn.
    (``<think>`` is a token, but part of the text.)"""
    chat_template: ChatTemplate | None

    def encode(self, text: str, how: EncodeOptions = AS_PROMPT) -> list[int]:
        """Return the ids of ``text``. O(len(text))."""
        ...

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``. Ids without text (padding of the vocabulary) give none,
        invalid bytes give U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, special tokens included."""
        ...

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder: ...

    def as_json(self) -> str | None:
        """Return the contents of a ``tokenizer.json``, or None if the tokens are bytes."""
        ...
