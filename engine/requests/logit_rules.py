"""Rules that restrict or bias the tokens of one answer before they are sampled.

The rules of a request are applied in order: its grammar (a plugin), the reasoning budget, bans and
biases, then penalties. The sampler reads the results, one ``Ruling`` for each draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.text.grammar import GrammarError
from engine.text.tokenizer import CLOSE, OPEN, Tokenizer
from hybridcache.radix.tokens import Tokens

Mask = npt.NDArray[np.uint8]
"""Bit ``i % 8`` of byte ``i // 8`` is set if token i is allowed."""
Additions = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Token ids, and the number added to the logit of each."""
END = f"\n{CLOSE}\n\n"
"""End of reasoning as models write it."""
TAIL = 16
"""Number of final prompt tokens that are searched for an open ``<think>`` and white space."""


class Repeats(NamedTuple):
    """Penalties of tokens that are in the prompt or the answer already."""

    ids: npt.NDArray[np.int64]
    """Each token once."""
    numbers: npt.NDArray[np.float64]
    """``[2, n]``. Positive logits are divided by the first row and negative ones multiplied by it;
    the second row is subtracted."""


class Ruling(NamedTuple):
    """Changes to the logits of one draw, applied in the order of the fields but for the mask, which
    is last."""

    mask: Mask | None = None
    """Allowed tokens; None if all are."""
    added: Additions | None = None
    """Numbers added to logits; None if there are none."""
    repeats: Repeats | None = None
    """Penalties, or None if there are none."""
    is_final: bool = False
    """True if no later rule may change it."""
    fault: GrammarError | None = None
    """Reason why the answer cannot go on with this draw, or None."""


FREE = Ruling()


def before_draws(answer: Tokens, drafts: Tokens) -> list[Tokens]:
    """Return the tokens before each draw of a step: one draw after ``answer``, and one after each
    of ``drafts``. O(answer)."""
    known, num_answered = np.concatenate([answer, drafts]), len(answer)
    return [known[: num_answered + place] for place in range(1 + len(drafts))]


def ruled(rules: Sequence[LogitRule], answer: Tokens, drafts: Tokens) -> Sequence[Ruling]:
    """Apply ``rules`` in order, each to the result of those before it but for final rulings."""
    rulings: Sequence[Ruling] = [FREE] * (1 + len(drafts))
    for rule in rules:
        changed = rule.apply(answer, drafts, rulings)
        rulings = [old if old.is_final else new for old, new in zip(rulings, changed, strict=True)]
    return rulings


class LogitRule:
    """One rule for one answer. Every method does nothing unless it is overridden.

    Rules depend on the tokens before a draw only, so an answer is the same with drafts, in any
    batch, and after a restart.
    """

    def possible(self, answer: Tokens, drafts: Tokens) -> Tokens:
        """Return the beginning of ``drafts`` that may follow ``answer``."""
        return drafts

    def apply(self, answer: Tokens, drafts: Tokens, rulings: Sequence[Ruling]) -> Sequence[Ruling]:
        """Return ``rulings``, one for each draw, changed by this rule."""
        return rulings

    def is_done(self, answer: Tokens) -> bool:
        """Return True if nothing can follow ``answer``. Raises GrammarError if the rule cannot be
        followed any further."""
        return False


def opens_reasoning(tokenizer: Tokenizer, prompt: Tokens) -> bool:
    """Return True if ``prompt`` ends with ``<think>``."""
    end = tokenizer.decode(prompt[-TAIL:].tolist(), skip_special_tokens=False)
    return end.rstrip().endswith(OPEN)


class ReasoningBudget(LogitRule):
    """Ends the reasoning of one answer after a number of tokens, by allowing only its end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        prompt: Tokens,
        budget: int,
        is_open: bool = False,
    ) -> None:
        """``budget``: tokens of reasoning, not counting ``<think>`` in the answer. ``is_open``: the
        prompt ends inside reasoning, even if its last tokens do not show it."""
        self._tokenizer = tokenizer
        self._is_open = is_open or opens_reasoning(tokenizer, prompt)
        opening = [] if self._is_open else tokenizer.encode(OPEN, add_special_tokens=False)
        self.first = budget + len(opening)
        """Number of the draw at which reasoning ends."""
        self._ids = tokenizer.encode(END, add_special_tokens=False)
        self._masks = [packed([token], vocab_size) for token in self._ids]

    def apply(self, answer: Tokens, drafts: Tokens, rulings: Sequence[Ruling]) -> list[Ruling]:
        """See ``LogitRule``. Tokens excluded by a grammar stay excluded. O(1) per draw, O(budget)
        at the end of reasoning."""
        changed = []
        for known, ruling in zip(before_draws(answer, drafts), rulings, strict=True):
            place = len(known) - self.first
            if 0 <= place < len(self._ids):
                end, start = self._masks[place], known[: self.first].tolist()
                text = self._tokenizer.decode(start, skip_special_tokens=False)
                is_open = self._is_open or text.lstrip().startswith(OPEN)
                is_possible = ruling.mask is None or bool((ruling.mask & end).any())
                if is_open and CLOSE not in text and is_possible:
                    ruling = Ruling(end, is_final=True)
            changed.append(ruling)
        return changed


class BansAndBiases(LogitRule):
    """Bans an early end, and adds biases. A ban never excludes all allowed tokens."""

    def __init__(
        self,
        bias: tuple[tuple[int, float], ...],
        ends: Sequence[int],
        min_tokens: int,
        vocab_size: int,
    ) -> None:
        """``ends``: tokens that end an answer, banned before ``min_tokens``."""
        ids, numbers = zip(*bias, strict=True) if bias else ((), ())
        self._added = (np.array(ids, np.int64), np.array(numbers, np.float32)) if bias else None
        self._ends, self._num_banned = ends, min_tokens if ends else 0
        self._all = packed(np.arange(vocab_size), vocab_size)

    def apply(self, answer: Tokens, drafts: Tokens, rulings: Sequence[Ruling]) -> list[Ruling]:
        """See ``LogitRule``. O(mask)."""
        changed = []
        for draw, ruling in enumerate(rulings, len(answer)):
            mask = ruling.mask
            if draw < self._num_banned:
                mask = _without(self._all if mask is None else mask, self._ends)
            changed.append(ruling._replace(mask=mask, added=self._added))
        return changed


class Penalties(LogitRule):
    """Penalises tokens that are in the answer, and with ``repetition`` those of the prompt too."""

    def __init__(
        self, prompt: Tokens, repetition: float, presence: float, frequency: float
    ) -> None:
        """See ``SamplingParams``. O(prompt log prompt) with ``repetition``."""
        self._prompt = prompt[: len(prompt) if repetition != 1 else 0]
        self._counts, self._num_counted = TokenCounts(self._prompt), 0
        self._repetition, self._presence, self._frequency = repetition, presence, frequency

    def apply(self, answer: Tokens, drafts: Tokens, rulings: Sequence[Ruling]) -> list[Ruling]:
        """See ``LogitRule``. O(new tokens + distinct tokens of each draw)."""
        if len(answer) < self._num_counted:  # The step of the newest token failed.
            self._counts, self._num_counted = TokenCounts(self._prompt), 0
        self._counts.add(answer[self._num_counted :])
        self._num_counted = len(answer)
        return [
            ruling._replace(repeats=self._of(self._counts.ahead(drafts[:place])))
            for place, ruling in enumerate(rulings)
        ]

    def _of(self, counts: TokenCounts) -> Repeats:
        numbers = counts.numbers
        taken = self._presence * (numbers > 0) + self._frequency * numbers
        factors = np.full(len(numbers), self._repetition)
        return Repeats(counts.ids, np.stack([factors, taken]))


class TokenCounts:
    """Distinct tokens of an answer with their numbers, and those of its prompt with 0.

    >>> counts = TokenCounts(np.array([7, 9, 7], np.int32))
    >>> counts.add(np.array([9, 9, 4], np.int32))
    >>> counts.ids.tolist(), counts.numbers.tolist()
    ([7, 9, 4], [0, 2, 1])
    """

    def __init__(self, prompt: Tokens) -> None:
        """O(prompt log prompt), once for a request."""
        self.ids = np.unique(prompt).astype(np.int64)
        """Each token once: int64[n]."""
        self.numbers = np.zeros(len(self.ids), np.int32)
        """Number of times that each is in the answer: int32[n]."""
        self._at = {token: at for at, token in enumerate(self.ids.tolist())}

    def add(self, tokens: Tokens) -> None:
        """Count the next tokens of the answer. O(these tokens) in Python, and a copy of the
        distinct ones."""
        new = tokens.tolist()
        unseen = [token for token in dict.fromkeys(new) if token not in self._at]
        self._at |= {token: at for at, token in enumerate(unseen, len(self._at))}
        self.ids = np.concatenate([self.ids, np.array(unseen, np.int64)])
        self.numbers = np.concatenate([self.numbers, np.zeros(len(unseen), np.int32)])
        for token in new:
            self.numbers[self._at[token]] += 1

    def ahead(self, tokens: Tokens) -> TokenCounts:
        """Return the counts of the answer followed by ``tokens``; itself without any. O(distinct
        tokens)."""
        if not len(tokens):
            return self
        ahead = copy(self)
        ahead._at = self._at.copy()
        ahead.add(tokens)
        return ahead


def packed(token_ids: npt.ArrayLike, vocab_size: int) -> Mask:
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
