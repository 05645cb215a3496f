"""Reasoning that ends at a budget: the model is made to say that it ends there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.requests.token_rules import packed
from engine.text.reasoning import CLOSE, OPEN
from engine.text.tokenizer import EncodeOptions
from hybridcache.tokens import Tokens

if TYPE_CHECKING:
    from engine.plugins.guided.bindings import Mask
    from engine.text.tokenizer import Tokenizer

AS_IT_STANDS = EncodeOptions(add_special_tokens=False)
END = f"\n{CLOSE}\n\n"
"""As models write it of themselves."""
TAIL = 16
"""Tokens of a prompt in which ``<think>`` at its end lies, white space behind it included."""


class ThoughtLimit:
    """Of one answer: which tokens are the only ones where its reasoning has used up its budget. A
    function of the tokens before, so that it is the same with drafts, in company, and anew."""

    __slots__ = ("_ids", "_is_open", "_masks", "_tokenizer", "first")

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, prompt: Tokens, budget: int) -> None:
        """``budget``: tokens of reasoning, those of ``<think>`` apart where the answer has it."""
        self._tokenizer = tokenizer
        self._is_open = self._text(prompt[-TAIL:]).rstrip().endswith(OPEN)
        opening = [] if self._is_open else tokenizer.encode(OPEN, AS_IT_STANDS)
        self.first = budget + len(opening)
        """Number of the draw at which reasoning is made to end."""
        self._ids = tokenizer.encode(END, AS_IT_STANDS)
        self._masks = [packed([token], vocab_size) for token in self._ids]

    def mask(self, draw: int, answer: Tokens) -> Mask | None:
        """For the token that ``draw`` others are before, of which ``answer`` has the first
        ``first`` at least; None: there is nothing to end. O(1), at its end O(budget)."""
        place = draw - self.first
        if not 0 <= place < len(self._ids):
            return None
        text = self._text(answer[: self.first])
        is_thinking = CLOSE not in text and (self._is_open or text.lstrip().startswith(OPEN))
        return self._masks[place] if is_thinking else None

    def _text(self, tokens: Tokens) -> str:
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
