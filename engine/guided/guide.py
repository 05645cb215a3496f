"""Which tokens may come next in a guided answer.

A grammar is compiled once, by whoever asks for it, and copied for each answer. Nearly all grammars
cost microseconds a token and are followed on the engine's thread, where the library's own limits
end every call within some 25 ms. A grammar that meets these limits, or takes more than a share of
the engine's time, is followed by a thread of its own (``background.py``). Its requests sit out
steps until their masks are found, and fail when their budget of grammar time is spent. Which thread
finds a mask never changes it.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.guided.background import BackgroundGrammar, Budget, Follower, Place
from engine.guided.grammar import Grammar, GrammarError
from engine.guided.library import (
    LIMITS,
    STEP_LIMITS,
    Mask,
    check_beginning,
    load_library,
    make_matcher,
    make_vocabulary,
)
from hybridcache.tokens import Tokens

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

NUM_REMEMBERED = 64
"""Compiled grammars."""
BUDGET_S = 10.0
"""Default grammar time of one request in the background."""
SHARE, BURST_S = 0.08, 0.015
"""Share of the time that grammars may take on the engine's thread, and how much at once."""
CHEAP_S, NUM_CHEAP = 1e-4, 32
"""Mean time a mask, and number of masks, by which a grammar has proved to be cheap."""
COSTLY_S = 2e-3
"""A grammar of which one mask takes longer leaves the engine's thread."""
NO_TOKENS: Tokens = np.empty(0, np.int32)
SPENT_STATES = "lexer error: too many states"
"""Message of a matcher whose copies have together found as many states as they may keep."""


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
        """``matcher`` has the limits of a step; None if the grammar does not fit them."""
        self.matcher = matcher
        self.background = background
        self.is_costly = matcher is None
        """New answers are followed in the background."""
        self._num_masks, self._seconds = 0, 0.0

    @property
    def is_cheap(self) -> bool:
        """Whether many masks were found, in little time each."""
        return self._num_masks >= NUM_CHEAP and self._seconds <= CHEAP_S * self._num_masks

    def count(self, num_masks: int, seconds: float) -> None:
        """Take note of time on the engine's thread."""
        self._num_masks += num_masks
        self._seconds += seconds
        if seconds > COSTLY_S * max(num_masks, 1):
            self.is_costly = True


class Guides:
    """Compiles grammars for one vocabulary. Safe to call from any thread."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, budget_s: float = BUDGET_S
    ) -> None:
        """``budget_s``: grammar time of one request in the background."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.num_mask_bytes = -(-vocab_size // 8)
        self.budget = Budget(budget_s)
        self.step_time = StepTime(time.perf_counter())
        self.news = threading.Event()
        """Set whenever a place was found in the background."""
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[Grammar, Compiled] = OrderedDict()

    def prepare(self) -> None:
        """Load the library and build its vocabulary, which would stop all threads later. Does
        nothing where answers cannot be guided."""
        try:
            self._load()
        except GrammarError:
            return

    def guide(self, grammar: Grammar) -> Guide:
        """Return the guide of a new answer. Raises GrammarError as ``compile``, which takes its
        time if the grammar is not one of the last that were compiled."""
        return Guide(self, grammar, self.compile(grammar), self.ends)

    def compile(self, grammar: Grammar) -> Compiled:
        """Compile ``grammar`` and remember it.

        Raises GrammarError if the library is missing, or the grammar is wrong, too large, or fits
        the empty answer only; TooComplex if its first two tokens take too much time.
        """
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        # Not under the lock: it may take a tenth of a second, and others compile theirs.
        compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > NUM_REMEMBERED:
                self._compiled.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar) -> Compiled:
        library, vocabulary = self._load()
        make = partial(make_matcher, library, vocabulary, grammar)
        background = BackgroundGrammar(library, vocabulary, lambda: make(LIMITS))
        try:
            matcher = make(STEP_LIMITS)
            check_beginning(matcher, self.ends, lambda tried, token: tried.consume_token(token))
        except GrammarError:
            # Which limit it met, if it did, is for the larger ones to say.
            check_beginning(background.first(), self.ends, background.consume)
            matcher = None
        return Compiled(matcher, background)

    def forget(self, grammar: Grammar, spent: Compiled) -> None:
        """Have ``grammar`` compiled again for later answers, if that is not done yet."""
        with self._lock:
            if self._compiled.get(grammar) is spent:
                del self._compiled[grammar]

    @property
    def ends(self) -> Tokens:
        """Tokens of the vocabulary that end an answer."""
        assert self._tokenizer is not None
        return np.array(sorted(self._tokenizer.eos_token_ids), np.int32)

    def _load(self) -> tuple[Any, Any]:
        library = load_library()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = make_vocabulary(library, self._tokenizer, self._vocab_size)
            return library, self._vocabulary


class Guide:
    """Follows one answer. Belongs to the engine's thread."""

    __slots__ = (
        "_compiled",
        "_ends",
        "_follower",
        "_grammar",
        "_guides",
        "_matcher",
        "_num_taken",
    )

    def __init__(self, guides: Guides, grammar: Grammar, compiled: Compiled, ends: Tokens) -> None:
        """The matcher is copied for the first token: queued requests do not allocate one."""
        self._guides = guides
        self._grammar = grammar
        self._compiled = compiled
        self._ends = ends
        self._matcher: Any = None
        self._num_taken = 0
        self._follower: Follower | None = None

    def masks(
        self, answer: Tokens, drafts: Tokens = NO_TOKENS, *, may_be_over: bool = True
    ) -> list[Mask] | None:
        """Return what may follow ``answer``, and what may follow it with each beginning of
        ``drafts``, which ``cut`` has left: 1 + d masks.

        None if they are not found yet, or will not be: ``is_done`` says so. If nothing can follow,
        the mask allows a token that ends answers, or, unless the answer ``may_be_over``, is None.
        O(new tokens) and the library's time for each.
        """
        if (begun := self._begin()) is not None:
            masks = self._masks(answer, drafts)
            if self._end(begun, len(masks)):
                return masks
        place = None if len(drafts) else self._place(answer)
        if place is None or (place.is_over and not may_be_over):
            return None
        return [place.mask]

    def cut(self, answer: Tokens, drafts: Tokens) -> Tokens:
        """Return the beginning of ``drafts`` that the grammar allows after ``answer``, without a
        token that ends it; empty for an answer that is followed in the background."""
        if (begun := self._begin()) is None:
            return drafts[:0]
        self._go_to(answer)
        drafts = drafts[: self._matcher.validate_tokens(drafts.tolist())]
        if not self._end(begun, len(drafts)):
            return drafts[:0]
        ends = np.isin(drafts, self._ends)
        return drafts[: int(ends.argmax())] if ends.any() else drafts

    def is_done(self, answer: Tokens) -> bool:
        """Return whether nothing can follow ``answer``, as far as is known now. Raises TooComplex
        if following it takes too much time."""
        if (begun := self._begin()) is not None:
            self._go_to(answer)
            if self._end(begun, 0):
                return bool(self._matcher.is_stopped())
        follower = self._in_background()
        follower.order(answer)
        place = follower.place(answer)
        return place is not None and place.is_over

    def close(self) -> None:
        """Give up all work: the request has ended."""
        self._matcher = None
        if self._follower is not None:
            self._follower.close()

    def _place(self, answer: Tokens) -> Place | None:
        follower = self._in_background()
        follower.order(answer)
        try:
            return follower.place(answer)
        except GrammarError:
            return None

    def _begin(self) -> tuple[float, float] | None:
        """Return the times at which work on the engine's thread begins; None if it may not."""
        if self._follower is not None or self._compiled.is_costly:
            return None
        now_s = time.perf_counter()
        left_s = self._guides.step_time.at(now_s)
        if left_s <= 0 and (left_s <= -BURST_S or not self._compiled.is_cheap):
            return None
        return now_s, time.thread_time()

    def _end(self, begun: tuple[float, float], num_masks: int) -> bool:
        """Charge the work since ``begun``. False if it met a limit of the library."""
        seconds = time.perf_counter() - begun[0]
        if seconds > CHEAP_S:  # perhaps because another process had the processor
            seconds = time.thread_time() - begun[1]
        self._guides.step_time.spend(seconds)
        self._compiled.count(num_masks, seconds)
        if not self._matcher.is_error():
            return True
        if self._matcher.get_error().startswith(SPENT_STATES):
            self._guides.forget(self._grammar, self._compiled)
        else:
            self._compiled.is_costly = True
        return False

    def _in_background(self) -> Follower:
        """Have the answer followed in the background from here on."""
        if self._follower is None:
            guides = self._guides
            self._follower = Follower(
                self._compiled.background, guides.budget, guides.num_mask_bytes, guides.news.set
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
        """Take just ``answer``, which begins with what was taken, or the reverse. O(difference)."""
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
        return mask[: self._guides.num_mask_bytes]
