"""Masks of the tokens that may come next in a guided answer.

A grammar is compiled once, outside the engine's thread, and copied for each answer. Each mask is
computed in the step that draws with it. The library's limits end every call within milliseconds,
so the same grammars are refused on every machine. A request whose grammar takes more than its
share of the engine's time fails.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.plugins.guided.bindings import reason
from engine.requests.grammar import GrammarError, TooComplex
from engine.requests.logit_rules import Draws, LogitRule, Mask, Ruling
from hybridcache.tokens import EMPTY, Tokens

SHARE, BURST_S = 0.08, 0.015
"""Share of the engine's time that all grammars may take together, and maximum at once."""
REQUEST_S, TOKEN_S = 0.05, 1e-4
"""Time that the grammar of one request may take in any case: at once, and for each token."""
CALL_S = 0.01
"""Maximum time that one call is charged, so that a garbage collection, page faults or a repeated
compilation in one call do not fail a request."""
RENEWAL_S = 0.02
"""Maximum time of a compilation that is repeated while an answer is followed."""
SPENT_STATES = "lexer error: too many states"
"""Message of a matcher with copies that have together reached the limit of states."""


class Shared:
    """Sizes that the guides of one engine share, and the processor time of the engine's thread that
    grammars may still use.

    >>> left = Shared(1, EMPTY, now_s=0.0)
    >>> left.spend(0.02, now_s=0.0)
    True
    >>> left.spend(0.0, now_s=0.5)
    False
    """

    def __init__(self, num_mask_bytes: int, ends: Tokens, now_s: float) -> None:
        self.num_mask_bytes = num_mask_bytes
        self.ends = ends
        """Tokens that end an answer."""
        self._seconds, self._at_s = BURST_S, now_s

    def spend(self, seconds: float, now_s: float) -> bool:
        """Take ``seconds``. Returns True if grammars have used more than their share."""
        self._seconds = min(BURST_S, self._seconds + SHARE * (now_s - self._at_s)) - seconds
        self._at_s = now_s
        return self._seconds < 0


class Compiled:
    """One grammar, for all answers that follow it."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """``make`` compiles the grammar. Raises as it does."""
        started_s = time.thread_time()
        self._make = make
        self.matcher = make()
        self._seconds = time.thread_time() - started_s

    def copy(self, spent: Any = None) -> tuple[Any, Any]:
        """Return a matcher at the beginning of an answer, and the one that it shares states with.

        ``spent`` is a shared matcher with states that its copies have used up: it is compiled
        again, unless that has happened for another answer. Raises TooComplex if that takes long.
        """
        if self.matcher is spent:
            if self._seconds > RENEWAL_S:
                raise TooComplex(SPENT_STATES)
            self.matcher = self._make()
        return self.matcher.deep_copy(), self.matcher


class GrammarRule(LogitRule):
    """Rule of one answer that must follow a grammar. Used in the engine's thread."""

    needs_newest = True

    def apply(self, draws: Draws, rulings: Sequence[Ruling]) -> list[Ruling]:
        return [
            Ruling(fault=mask, is_final=True) if isinstance(mask, GrammarError) else Ruling(mask)
            for mask in self.masks(draws.answer, draws.drafts)
        ]

    @abstractmethod
    def masks(self, answer: Tokens, drafts: Tokens = EMPTY) -> Sequence[Mask | GrammarError | None]:
        """Return 1 + d masks: for the token after ``answer``, and after each beginning of
        ``drafts``, which ``possible`` returned. A mask is None if every token is allowed, and an
        error if the grammar cannot be followed that far.

        If nothing can follow, the mask allows a token that ends answers. O(new tokens) and the
        library's time for each.
        """


class Guide(GrammarRule):
    """Follows one answer."""

    def __init__(self, compiled: Compiled, shared: Shared) -> None:
        """Prepare the guide. The matcher is copied for the first token, so queued requests do not
        allocate one."""
        self._compiled = compiled
        self._shared = shared
        self._matcher: Any = None
        self._source: Any = None
        """Matcher that ``_matcher`` shares its states with."""
        self._num_taken = 0
        self._spent_s = 0.0

    def masks(self, answer: Tokens, drafts: Tokens = EMPTY) -> list[Mask | GrammarError | None]:
        masks: list[Mask | GrammarError | None] = []
        try:
            for size in range(1 + len(drafts)):
                known = np.concatenate([answer, drafts[:size]]) if size else answer
                masks.append(self._found(known, self._mask))
        except GrammarError as error:
            masks += [error] * (1 + len(drafts) - len(masks))
        if len(drafts):
            self._go_to(answer)
        return masks

    def possible(self, answer: Tokens, drafts: Tokens) -> Tokens:
        """Return the beginning of ``drafts`` that the grammar allows after ``answer``, without a
        token that ends it."""
        try:
            num = self._found(answer, lambda: self._matcher.validate_tokens(drafts.tolist()))
        except GrammarError:
            return drafts[:0]
        ends = np.isin(drafts[:num], self._shared.ends)
        return drafts[: int(ends.argmax()) if ends.any() else num]

    def is_done(self, answer: Tokens) -> bool:
        """Return True if nothing can follow ``answer``. Raises TooComplex if following it takes too
        much time."""
        return bool(self._found(answer, lambda: self._matcher.is_stopped()))

    def _found(self, answer: Tokens, find: Callable[[], Any]) -> Any:
        """Return the result of ``find`` at the end of ``answer``. Raises TooComplex."""
        started_s = time.thread_time()
        self._go_to(answer)
        found = find()
        if self._matcher.is_error():
            # Other answers may have used up the states that all copies share.
            message = self._matcher.get_error()
            self._matcher = None
            if not message.startswith(SPENT_STATES):
                raise TooComplex(reason(message))
            self._matcher, self._source = self._compiled.copy(self._source)
            self._num_taken = 0
            self._go_to(answer)
            found = find()
            if self._matcher.is_error():
                message, self._matcher = self._matcher.get_error(), None
                raise TooComplex(reason(message))
        self._charge(time.thread_time() - started_s, len(answer))
        return found

    def _charge(self, seconds: float, num_tokens: int) -> None:
        seconds = min(seconds, CALL_S)
        self._spent_s += seconds
        is_over = self._shared.spend(seconds, time.perf_counter())
        if is_over and self._spent_s > REQUEST_S + TOKEN_S * num_tokens:
            raise TooComplex(
                f"it took {1e3 * self._spent_s:.0f} ms for {num_tokens} tokens, and grammars may "
                f"take {SHARE:.0%} of the engine's time"
            )

    def _go_to(self, answer: Tokens) -> None:
        """Move the matcher to the end of ``answer``, forwards or backwards. O(difference)."""
        if self._matcher is None:
            self._matcher, self._source = self._compiled.copy()
            self._num_taken = 0
        surplus = self._num_taken - len(answer)
        if surplus > 0:
            self._matcher.rollback(surplus)
        elif surplus < 0:
            self._matcher.consume_tokens(answer[self._num_taken :].tolist())
        self._num_taken = len(answer)

    def _mask(self) -> Mask:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return mask[: self._shared.num_mask_bytes]
