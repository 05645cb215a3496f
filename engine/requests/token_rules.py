"""Which tokens may not come next, or are made more or less likely, before any is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.plugins.guided.bindings import Mask
from hybridcache.tokens import Tokens

if TYPE_CHECKING:
    from engine.requests.reasoning_budget import ThoughtLimit

Additions = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Token ids, and what is added to the logit of each."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenRules:
    """What one request asks for beside temperature and penalties, in token ids."""

    bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    ends: tuple[int, ...] = ()
    """Tokens that end an answer, which none does that is shorter than ``min_tokens``."""
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that are never completed."""
    allowed: Mask | None = None
    """The tokens that there are for this request; None: all."""
    thoughts: ThoughtLimit | None = None
    """What ends its reasoning; None: the model does."""

    def must_see(self, draw: int) -> bool:
        """The rules for the token with this number look at the one before it."""
        return self.thoughts is not None and draw == self.thoughts.first

    def at(
        self, draw: int, answer: Tokens, mask: Mask | None
    ) -> tuple[Mask | None, Additions | None]:
        """The rules for the token that ``draw`` others are before, ``answer``, as far as it is
        known, among them: what is allowed (``mask`` by a grammar), and what is added. The only
        tokens that are allowed are not forbidden. O(rules + mask)."""
        banned = self._banned(draw, answer)
        mask = self.allowed if mask is None else mask
        end = None if self.thoughts is None else self.thoughts.mask(draw, answer)
        if end is not None and (mask is None or (mask & end).any()):
            return end, None
        if mask is not None and banned:
            mask, banned = _without(mask, banned), []
        ids = [token for token, _ in self.bias] + banned
        if not ids:
            return mask, None
        added = [value for _, value in self.bias] + [-np.inf] * len(banned)
        return mask, (np.array(ids, np.int64), np.array(added, np.float32))

    def _banned(self, draw: int, answer: Tokens) -> list[int]:
        banned = list(self.ends) if draw < self.min_tokens else []
        for *before, last in self.bad_words:
            if not before or answer[-len(before) :].tolist() == before:
                banned.append(last)
        return banned


NO_RULES = TokenRules()


def packed(token_ids: Sequence[int], vocab_size: int) -> Mask:
    """The mask that allows ``token_ids``."""
    allowed = np.zeros(-(-vocab_size // 8) * 8, np.uint8)
    allowed[np.asarray(token_ids)] = 1
    return np.packbits(allowed, bitorder="little")


def _without(mask: Mask, banned: Sequence[int]) -> Mask:
    """``mask`` but for ``banned``; all of it where nothing else would be left."""
    less = mask.copy()
    for token in banned:
        less[token >> 3] &= ~(1 << (token & 7)) & 0xFF
    return less if less.any() else mask
