"""Tokenizer for models without one: a text is a list of token ids in decimal."""

from __future__ import annotations

from collections.abc import Iterable

from engine.text.chat_template import ChatTemplate
from engine.text.stream_decoders import ByteStreamDecoder, StreamDecoder
from engine.text.tokenizer import AS_PROMPT, EncodeOptions


class IdTokenizer:
    """Writes each id in decimal, after a space.

    >>> tokenizer = IdTokenizer(320, frozenset({2}))
    >>> tokenizer.encode("17 4"), tokenizer.decode([17, 4])
    ([17, 4], ' 17 4')
    """

    special_tokens: tuple[str, ...] = ()
    control_tokens: tuple[str, ...] = ()
    chat_template: ChatTemplate | None = None

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids

    def encode(self, text: str, how: EncodeOptions = AS_PROMPT) -> list[int]:
        """Return the ids in ``text``. Raises ValueError if the text is not a list of numbers."""
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(
                "this model has no tokenizer: pass the prompt as token ids, or as a text of "
                "numbers."
            ) from None

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.decode([token_id]).encode()

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        return ByteStreamDecoder(self.token_bytes, frozenset())

    def as_json(self) -> None:
        return None
