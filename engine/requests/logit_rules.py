"""Rules that restrict or bias the tokens of one answer before they are sampled.

``LogitRule`` is the interface. The rules of a request are applied in order, each to the result of
the previous ones: its grammar (a plugin), allowed tokens, the reasoning budget, then bans and
biases. Penalties depend on all tokens sampled so far and are computed by the sampler from
``TokenCounts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from engine.text.reasoning import CLOSE, OPEN
from engine.text.tokenizer import EncodeOptions
from hybridcache.tokens import Tokens

if TYPE_CHECKING:
    from engine.requests.grammar import Grammar
    from engine.text.tokenizer import Tokenizer

Mask = npt.NDArray[np.uint8]
"""Bit ``i % 8`` of byte ``i // 8`` is set if token i is allowed."""
Additions = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Token ids, and the number added to the logit of each."""
WITHOUT_SPECIAL = EncodeOptions(add_special_tokens=False)
END = f"\n{CLOSE}\n\n"
"""End of reasoning as models write it."""
TAIL = 16
"""Number of final prompt tokens that are searched for an open ``<think>``, with white space after
it."""


class Ruling(NamedTuple):
    """Restrictions on one draw."""

    mask: Mask | None = None
    """Allowed tokens; None if all are."""
    added: Additions | None = None
    """Numbers added to logits, before the penalties; None if there are none."""
    is_final: bool = False
    """True if no later rule may change it."""


FREE = Ruling()


class LogitRule:
    """One rule for one answer. Every method does nothing unless it is overridden.

    Rules depend on the tokens before a draw only, so an answer is the same with drafts, in any
    batch, and after a restart.
    """

    needs_newest = False
    """True if the rule reads the newest token, which may not have reached the host yet."""

    def must_see(self, draw: int) -> bool:
        """Return True if the rule for draw number ``draw`` reads the token before it. The host
        must have that token before the step is scheduled."""
        return False

    def possible(self, answer: Tokens, drafts: Tokens) -> Tokens:
        """Return the beginning of ``drafts`` that may follow ``answer``."""
        return drafts

    def apply(
        self,
        draw: int,
        answer: Tokens,
        drafts: Tokens,
        rulings: Sequence[Ruling],
        *,
        may_be_over: bool,
    ) -> Sequence[Ruling] | None:
        """Apply this rule to ``rulings``: one for draw number ``draw``, and one after each of
        ``drafts``.

        Returns None if the rule is not ready yet. ``may_be_over``: the step may still commit a
        token that ends the answer.
        """
        return rulings

    def is_done(self, answer: Tokens) -> bool:
        """Return True if nothing can follow ``answer``. Raises GrammarError if the rule cannot be
        followed any further."""
        return False

    def close(self) -> None:
        """End background work: the request has ended."""


class GrammarCompiler(Protocol):
    """Compiles grammars for one engine. Safe to call from any thread."""

    def load(self) -> None:
        """Load the library and the vocabulary; see ``Engine.prepare_grammars``."""
        ...

    def compile(self, grammar: Grammar) -> None:
        """Compile and remember ``grammar``. Raises GrammarError."""
        ...

    def rule(self, grammar: Grammar) -> LogitRule:
        """Return the rule of a new answer. Raises GrammarError."""
        ...


class AllowedTokens(LogitRule):
    """Allows only the given tokens, unless a grammar already restricts the draw."""

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        self._mask = packed(token_ids, vocab_size)

    def apply(
        self,
        draw: int,
        answer: Tokens,
        drafts: Tokens,
        rulings: Sequence[Ruling],
        *,
        may_be_over: bool,
    ) -> list[Ruling]:
        """See ``LogitRule``."""
        return [
            ruling._replace(mask=self._mask) if ruling.mask is None else ruling
            for ruling in rulings
        ]


class ReasoningBudget(LogitRule):
    """Ends the reasoning of one answer after a number of tokens, by allowing only its end."""

    __slots__ = ("_ids", "_is_open", "_masks", "_tokenizer", "first")

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, prompt: Tokens, budget: int) -> None:
        """``budget``: tokens of reasoning, not counting ``<think>`` in the answer."""
        self._tokenizer = tokenizer
        self._is_open = self._text(prompt[-TAIL:]).rstrip().endswith(OPEN)
        opening = [] if self._is_open else tokenizer.encode(OPEN, WITHOUT_SPECIAL)
        self.first = budget + len(opening)
        """Number of the draw at which reasoning ends."""
        self._ids = tokenizer.encode(END, WITHOUT_SPECIAL)
        self._masks = [packed([token], vocab_size) for token in self._ids]

    def must_see(self, draw: int) -> bool:
        """See ``LogitRule``."""
        return draw == self.first

    def mask(self, draw: int, answer: Tokens) -> Mask | None:
        """Return the mask of the one token that draw number ``draw`` may give, or None if the
        budget is not used up.

        ``answer`` has at least ``first`` tokens. O(1), at the end O(budget).
        """
        place = draw - self.first
        if not 0 <= place < len(self._ids):
            return None
        text = self._text(answer[: self.first])
        is_thinking = CLOSE not in text and (self._is_open or text.lstrip().startswith(OPEN))
        return self._masks[place] if is_thinking else None

    def apply(
        self,
        draw: int,
        answer: Tokens,
        drafts: Tokens,
        rulings: Sequence[Ruling],
        *,
        may_be_over: bool,
    ) -> list[Ruling]:
        """See ``LogitRule``. Tokens excluded by a grammar stay excluded."""
        known, ruled = np.concatenate([answer, drafts]), []
        for place, ruling in enumerate(rulings):
            end = self.mask(draw + place, known[: len(answer) + place])
            if end is not None and (ruling.mask is None or (ruling.mask & end).any()):
                ruling = Ruling(end, None, is_final=True)
            ruled.append(ruling)
        return ruled

    def _text(self, tokens: Tokens) -> str:
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


class BansAndBiases(LogitRule):
    """Bans bad words and an early end, and adds biases. A ban never excludes all allowed tokens."""

    __slots__ = ("_bad_words", "_bias", "_ends", "_min_tokens")

    def __init__(
        self,
        bias: tuple[tuple[int, float], ...],
        ends: tuple[int, ...],
        min_tokens: int,
        bad_words: tuple[tuple[int, ...], ...],
    ) -> None:
        """``bias``: (token, number added to its logit). ``ends``: tokens that end an answer, banned
        before ``min_tokens``. ``bad_words``: runs of tokens that are never completed."""
        self._bias, self._ends = bias, ends
        self._min_tokens, self._bad_words = min_tokens, bad_words

    def apply(
        self,
        draw: int,
        answer: Tokens,
        drafts: Tokens,
        rulings: Sequence[Ruling],
        *,
        may_be_over: bool,
    ) -> list[Ruling]:
        """See ``LogitRule``. O(rules + mask)."""
        known = np.concatenate([answer, drafts])
        return [
            ruling
            if ruling.is_final
            else self._at(draw + place, known[: len(answer) + place], ruling)
            for place, ruling in enumerate(rulings)
        ]

    def _at(self, draw: int, answer: Tokens, ruling: Ruling) -> Ruling:
        mask, banned = ruling.mask, self._banned(draw, answer)
        if mask is not None and banned:
            mask, banned = _without(mask, banned), []
        ids = [token for token, _ in self._bias] + banned
        if not ids:
            return Ruling(mask)
        added = [value for _, value in self._bias] + [-np.inf] * len(banned)
        return Ruling(mask, (np.array(ids, np.int64), np.array(added, np.float32)))

    def _banned(self, draw: int, answer: Tokens) -> list[int]:
        banned = list(self._ends) if draw < self._min_tokens else []
        for *before, last in self._bad_words:
            if not before or answer[-len(before) :].tolist() == before:
                banned.append(last)
        return banned


def packed(token_ids: Sequence[int], vocab_size: int) -> Mask:
    """Return the mask that allows ``token_ids``."""
    allowed = np.zeros(-(-vocab_size // 8) * 8, np.uint8)
    allowed[np.asarray(token_ids)] = 1
    return np.packbits(allowed, bitorder="little")


def _without(mask: Mask, banned: Sequence[int]) -> Mask:
    """Return ``mask`` without ``banned``; unchanged if nothing would be left."""
    less = mask.copy()
    for token in banned:
        less[token >> 3] &= ~(1 << (token & 7)) & 0xFF
    return less if less.any() else mask
