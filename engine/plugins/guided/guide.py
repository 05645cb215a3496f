"""Masks of the tokens that may come next in a guided answer.

A grammar is compiled once, in the thread of its caller, and copied for each answer. Nearly all
grammars cost microseconds per token and are followed on the engine's thread, where the library's
limits end every call within some 25 ms. A grammar that reaches these limits, or takes more than a
share of the engine's time, is followed by background threads (``background.py``). Its requests are
not part of steps until their masks are found, and fail when their budget of grammar time is spent.
The thread that finds a mask has no influence on it.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.plugins.guided.background import (
    BackgroundGrammar,
    Budget,
    GrammarFollower,
    GrammarPlace,
)
from engine.requests.grammar import GrammarError
from engine.requests.logit_rules import Draws, LogitRule, Mask, Ruling
from hybridcache.tokens import Tokens

SHARE, BURST_S = 0.08, 0.015
"""Share of the time that grammars may take on the engine's thread, and maximum at once."""
CHEAP_S, NUM_CHEAP = 1e-4, 32
"""Mean time per mask, and number of masks, with which a grammar counts as cheap."""
COSTLY_S = 2e-3
"""Time of one mask above which a grammar leaves the engine's thread."""
NO_TOKENS: Tokens = np.empty(0, np.int32)
SPENT_STATES = "lexer error: too many states"
"""Message of a matcher with copies that have together reached the limit of states."""


class StepTime:
    """Processor time of the engine's thread that grammars may still use.

    >>> left = StepTime(now_s=0.0)
    >>> left.spend(0.02); round(left.at(0.0), 3)
    -0.005
    >>> left.at(0.5)
    0.015
    """

    __slots__ = ("_at_s", "_seconds")

    def __init__(self, now_s: float) -> None:
        self._seconds, self._at_s = BURST_S, now_s

    def at(self, now_s: float) -> float:
        """Return the seconds that are left now; negative after a long call."""
        left = self._seconds + SHARE * (now_s - self._at_s)
        self._seconds, self._at_s = BURST_S if left > BURST_S else left, now_s
        return self._seconds

    def spend(self, seconds: float) -> None:
        self._seconds -= seconds


class Compiled:
    """One grammar, for all answers that follow it."""

    def __init__(self, matcher: Any, background: BackgroundGrammar) -> None:
        """``matcher`` has the limits of a step; None if the grammar exceeds them."""
        self.matcher = matcher
        self.background = background
        self.is_costly = matcher is None
        """True if answers are followed in the background."""
        self.is_spent = False
        """True if its copies have together reached the limit of states, so it must be compiled
        again."""
        self._num_masks, self._seconds = 0, 0.0

    @property
    def is_cheap(self) -> bool:
        """True if many masks were found, each in little time."""
        return self._num_masks >= NUM_CHEAP and self._seconds <= CHEAP_S * self._num_masks

    def count(self, num_masks: int, seconds: float) -> None:
        """Record time on the engine's thread."""
        self._num_masks += num_masks
        self._seconds += seconds
        if seconds > COSTLY_S * max(num_masks, 1):
            self.is_costly = True


@dataclass(frozen=True, slots=True)
class Shared:
    """Values that the guides of one engine share."""

    num_mask_bytes: int
    ends: Tokens
    """Tokens that end an answer."""
    budget: Budget
    """Budget of one request in the background."""
    step_time: StepTime
    news: threading.Event
    """Set whenever a place was found in the background."""


class GrammarRule(LogitRule):
    """Rule of one answer that must follow a grammar. Used in the engine's thread."""

    needs_newest = True

    def apply(self, draws: Draws, rulings: Sequence[Ruling]) -> list[Ruling] | None:
        masks = self.masks(draws.answer, draws.drafts, may_be_over=draws.may_be_over)
        return None if masks is None else [Ruling(mask) for mask in masks]

    @abstractmethod
    def masks(
        self, answer: Tokens, drafts: Tokens = NO_TOKENS, *, may_be_over: bool = True
    ) -> Sequence[Mask | None] | None:
        """Return 1 + d masks: for the token after ``answer``, and after each beginning of
        ``drafts``, which ``possible`` returned. A mask is None if every token is allowed.

        None if they are not found yet, or never will be; ``is_done`` distinguishes these. If
        nothing can follow, the mask allows a token that ends answers, or is None unless the answer
        ``may_be_over``. O(new tokens) and the library's time for each.
        """


class Guide(GrammarRule):
    """Follows one answer."""

    def __init__(self, compiled: Compiled, shared: Shared) -> None:
        """Prepare the guide. The matcher is copied for the first token, so queued requests do not
        allocate one."""
        self._compiled = compiled
        self._shared = shared
        self._matcher: Any = None
        self._num_taken = 0
        self._follower: GrammarFollower | None = None

    def masks(
        self, answer: Tokens, drafts: Tokens = NO_TOKENS, *, may_be_over: bool = True
    ) -> Sequence[Mask] | None:
        if (begun := self._begin()) is not None:
            masks = self._masks(answer, drafts)
            if self._end(begun, len(masks)):
                return masks
        place = None if len(drafts) else self._place(answer)
        if place is None or (place.is_over and not may_be_over):
            return None
        return [place.mask]

    def possible(self, answer: Tokens, drafts: Tokens) -> Tokens:
        """Return the beginning of ``drafts`` that the grammar allows after ``answer``, without a
        token that ends it. Empty for an answer that is followed in the background."""
        if (begun := self._begin()) is None:
            return drafts[:0]
        self._go_to(answer)
        drafts = drafts[: self._matcher.validate_tokens(drafts.tolist())]
        if not self._end(begun, len(drafts)):
            return drafts[:0]
        ends = np.isin(drafts, self._shared.ends)
        return drafts[: int(ends.argmax())] if ends.any() else drafts

    def is_done(self, answer: Tokens) -> bool:
        """Return True if nothing can follow ``answer``, as far as known. Raises TooComplex if
        following it takes too much time."""
        return self.is_over(answer) is True

    def is_over(self, answer: Tokens) -> bool | None:
        """Return True if nothing can follow ``answer``, or None if that is not known yet. Raises as
        ``is_done``."""
        if (begun := self._begin()) is not None:
            self._go_to(answer)
            if self._end(begun, 0):
                return bool(self._matcher.is_stopped())
        follower = self._in_background()
        follower.order(answer)
        place = follower.place(answer)
        return None if place is None else place.is_over

    def close(self) -> None:
        self._matcher = None
        if self._follower is not None:
            self._follower.close()

    def _place(self, answer: Tokens) -> GrammarPlace | None:
        follower = self._in_background()
        follower.order(answer)
        try:
            return follower.place(answer)
        except GrammarError:
            return None

    def _begin(self) -> tuple[float, float] | None:
        """Return the times at which work on the engine's thread begins, or None if it is not
        allowed there."""
        if self._follower is not None or self._compiled.is_costly:
            return None
        now_s = time.perf_counter()
        left_s = self._shared.step_time.at(now_s)
        if left_s <= 0 and (left_s <= -BURST_S or not self._compiled.is_cheap):
            return None
        return now_s, time.thread_time()

    def _end(self, begun: tuple[float, float], num_masks: int) -> bool:
        """Charge the work since ``begun``. Returns False if it reached a limit of the library."""
        seconds = time.perf_counter() - begun[0]
        if seconds > CHEAP_S:  # possibly because another process used the processor
            seconds = time.thread_time() - begun[1]
        self._shared.step_time.spend(seconds)
        self._compiled.count(num_masks, seconds)
        if not self._matcher.is_error():
            return True
        if self._matcher.get_error().startswith(SPENT_STATES):
            self._compiled.is_spent = True
        else:
            self._compiled.is_costly = True
        return False

    def _in_background(self) -> GrammarFollower:
        """Follow the answer in the background from now on."""
        if self._follower is None:
            shared = self._shared
            self._follower = GrammarFollower(
                self._compiled.background, shared.budget, shared.num_mask_bytes, shared.news.set
            )
            self._matcher = None
        return self._follower

    def _masks(self, answer: Tokens, drafts: Tokens) -> list[Mask]:
        self._go_to(answer)
        masks = [self._mask()]
        for token in drafts.tolist():
            if self._matcher.is_error():
                break
            self._matcher.consume_token(token)
            self._num_taken += 1
            masks.append(self._mask())
        if len(drafts):
            self._go_to(answer)
        return masks

    def _go_to(self, answer: Tokens) -> None:
        """Move the matcher to the end of ``answer``, forwards or backwards. O(difference)."""
        if self._matcher is None:
            self._matcher = self._compiled.matcher.deep_copy()
        surplus = self._num_taken - len(answer)
        if surplus > 0:
            self._matcher.rollback(surplus)
        elif surplus < 0:
            self._matcher.consume_tokens(answer[self._num_taken :].tolist())
        self._num_taken = len(answer)

    def _mask(self) -> Mask:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return mask[: self._shared.num_mask_bytes]
