"""Background threads for grammars that are too slow for the engine's thread.

Every call of llguidance that may take long is made without holding the interpreter's lock, in a
thread of lower priority. The engine's thread reads results and never waits for one. The threads
serve all grammars in turn. There are at most half as many as processors: a thread that loses its
processor while it holds the interpreter's lock delays the engine's thread.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from engine.config import num_cores
from engine.plugins.guided.bindings import reason
from engine.requests.grammar import GrammarError, TooComplex
from engine.requests.logit_rules import Mask
from hybridcache.tokens import Tokens

NICENESS = 10
"""Added to the niceness of background threads (Linux only)."""
IDLE_S = 1.0
"""Idle time in seconds after which a background thread ends."""
SLICE_S = 0.1
"""Time in seconds after which a thread turns to the next grammar. A call is not interrupted."""
MOST_THREADS = 8
"""Most background threads of a process, however many cores it has."""
SECONDS_PER_TOKEN = 0.005
"""Grammar time per token of an answer that is not charged to the budget."""


class Budget(NamedTuple):
    """Grammar time that one request may take in the background."""

    seconds: float

    def check(self, spent_s: float, num_tokens: int) -> None:
        """Raise TooComplex if ``spent_s`` is more than an answer of ``num_tokens`` may take."""
        if spent_s > self.seconds + SECONDS_PER_TOKEN * num_tokens:
            raise TooComplex(
                f"it took {spent_s:.1f} s for {num_tokens} tokens; a request has a budget of "
                f"{self.seconds:g} s, and {1e3 * SECONDS_PER_TOKEN:g} ms for each token"
            )


class GrammarPlace(NamedTuple):
    """Result of following a grammar to the end of an answer."""

    mask: Mask
    is_over: bool
    """True if nothing can follow the answer."""


class GrammarThreads:
    """Threads of lower priority that run the work of all grammars of an engine in turn.

    The works of one grammar run one after the other, because copies of a matcher share a lock
    inside llguidance.
    """

    def __init__(self, max_threads: int | None = None) -> None:
        """``max_threads``: None for half of the cores, from 1 to ``MOST_THREADS``."""
        self._max_threads = max_threads or max(1, min(num_cores() // 2, MOST_THREADS))
        self._wake = threading.Condition()
        self._waiting: deque[BackgroundGrammar] = deque()
        """Grammars with work that is not running, each once."""
        self._threads: set[threading.Thread] = set()
        self._num_idle = 0

    def submit(self, grammar: BackgroundGrammar, work: Callable[[], None]) -> None:
        """Queue ``work`` of ``grammar``, which must not raise."""
        with self._wake:
            grammar.works.append(work)
            if grammar.is_active:
                return
            grammar.is_active = True
            self._waiting.append(grammar)
            if len(self._waiting) > self._num_idle and len(self._threads) < self._max_threads:
                thread = threading.Thread(target=self._run, name="grammar", daemon=True)
                self._threads.add(thread)
                _running.add(self)
                thread.start()
            self._wake.notify()

    def _run(self) -> None:
        _lower_priority()
        while (grammar := self._next()) is not None:
            grammar.works.popleft()()
            with self._wake:
                if grammar.works:
                    self._waiting.append(grammar)
                else:
                    grammar.is_active = False

    def _next(self) -> BackgroundGrammar | None:
        """Wait for a grammar with work. Returns None if there is none for ``IDLE_S``."""
        with self._wake:
            self._num_idle += 1
            self._wake.wait_for(lambda: self._waiting or _is_exiting, IDLE_S)
            self._num_idle -= 1
            if self._waiting and not _is_exiting:
                return self._waiting.popleft()
            self._threads.discard(threading.current_thread())
            if not self._threads:
                _running.discard(self)
            return None

    def stop(self) -> None:
        """End all threads after their current call of the library."""
        with self._wake:
            threads = tuple(self._threads)
            self._wake.notify_all()
        for thread in threads:
            thread.join(2.0)


class BackgroundGrammar:
    """One compiled grammar that is followed in the background."""

    def __init__(
        self,
        library: Any,
        vocabulary: Any,
        make_matcher: Callable[[], Any],
        threads: GrammarThreads,
    ) -> None:
        """``make_matcher`` compiles the grammar. It is called when the first answer begins."""
        self._library = library
        self._broken = library.LLMatcher(vocabulary, "", log_level=0)
        self._make_matcher = make_matcher
        self._matcher: Any = None
        self._threads = threads
        self.works: deque[Callable[[], None]] = deque()
        """Queued works without the one that runs. Belongs to ``threads``."""
        self.is_active = False
        """True if there is work, queued or running. Belongs to ``threads``."""

    def submit(self, work: Callable[[], None]) -> None:
        """Queue ``work``, which must not raise. It runs after all earlier work of the grammar."""
        self._threads.submit(self, work)

    def copy(self, spent: Any = None) -> Any:
        """Return a matcher at the beginning of an answer.

        ``spent`` is a shared matcher with limits that its copies have used up: it is compiled
        again, unless that has happened for another answer.
        """
        if self._matcher is spent:
            self._matcher = None
        return self.first().deep_copy()

    def first(self) -> Any:
        """Return the matcher that copies are made of. Raises GrammarError if its compilation
        does."""
        if self._matcher is None:
            self._matcher = self._make_matcher()
        return self._matcher

    def consume(self, matcher: Any, token: int) -> None:
        """Advance ``matcher`` by one token, without holding the interpreter's lock.

        The library releases the lock only for two or more matchers, so a broken one is passed too.
        """
        executor = getattr(_local, "executor", None)
        if executor is None:
            executor = _local.executor = self._library.LLExecutor(1)
        executor.consume_token_par([(matcher, token), (self._broken, 0)])


class GrammarFollower:
    """Follows one answer in the background. The engine's thread calls its public methods."""

    def __init__(
        self,
        grammar: BackgroundGrammar,
        budget: Budget,
        num_bytes: int,
        when_done: Callable[[], None],
    ) -> None:
        """``num_bytes``: length of a mask. ``when_done`` is called in the thread for each place."""
        self._grammar = grammar
        self._budget = budget
        self._num_bytes = num_bytes
        self._when_done = when_done
        self._ordered: tuple[int, int] | None = None
        self._found: tuple[tuple[int, int], GrammarPlace] | None = None
        self._error: GrammarError | None = None
        self._is_closed = False
        # The fields below belong to the background thread.
        self._matcher: Any = None
        self._shared: Any = None
        self._num_taken = 0
        self._spent_s = 0.0
        self._was_renewed = False

    def order(self, answer: Tokens) -> None:
        """Queue the search for the place of ``answer``, unless it was the last one queued."""
        key = _key(answer)
        if key != self._ordered and self._error is None:
            self._ordered = key
            # A view is safe: an answer's buffer only grows, and a replaced buffer does not change.
            self._grammar.submit(lambda: self._work(key, answer))

    def place(self, answer: Tokens) -> GrammarPlace | None:
        """Return the place of ``answer``, or None if it is not found yet. Raises GrammarError if
        the grammar cannot be followed that far."""
        if self._error is not None:
            raise self._error
        if self._found is None or self._found[0] != _key(answer):
            return None
        return self._found[1]

    def close(self) -> None:
        """Skip all queued work."""
        self._is_closed = True

    def _work(self, key: tuple[int, int], answer: Tokens) -> None:
        if self._is_closed:
            self._matcher = self._shared = None
            return
        try:
            place = self._find(answer)
            if place is None:  # Other answers and grammars come first.
                self._grammar.submit(lambda: self._work(key, answer))
                return
            self._found = key, place
        except GrammarError as error:
            self._error = error
        except Exception as error:
            self._error = GrammarError(f"the grammar cannot be followed: {error!r}.")
        self._when_done()

    def _find(self, answer: Tokens) -> GrammarPlace | None:
        """Return the place of ``answer``, or None if that takes longer than ``SLICE_S``."""
        if not self._go_to(answer):
            return None
        matcher = self._matcher
        is_over = bool(matcher.is_stopped())
        started_s = time.thread_time()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)[: self._num_bytes]
        self._charge(time.thread_time() - started_s, len(answer))
        if not matcher.is_error():
            return GrammarPlace(mask, is_over)
        if self._was_renewed:
            raise TooComplex(reason(matcher.get_error()))
        # Other answers may have used up the limits that all copies share.
        self._was_renewed, self._matcher = True, None
        return self._find(answer)

    def _go_to(self, answer: Tokens) -> bool:
        """Move the matcher towards the end of ``answer``. Returns False if ``SLICE_S`` passed
        before."""
        if self._matcher is None:
            self._matcher = self._grammar.copy(self._shared)
            self._shared, self._num_taken = self._grammar.first(), 0
        matcher = self._matcher
        if self._num_taken > len(answer):
            matcher.rollback(self._num_taken - len(answer))
            self._num_taken = len(answer)
        begun_s = time.perf_counter()
        for token in answer[self._num_taken :].tolist():
            # The library's thread has no separate clock. The smaller of the two times excludes the
            # time that other processes took.
            started_s, worked_s = time.perf_counter(), time.process_time()
            self._grammar.consume(matcher, token)
            self._num_taken += 1
            passed_s, worked_s = time.perf_counter() - started_s, time.process_time() - worked_s
            self._charge(min(passed_s, worked_s), len(answer))
            if self._is_closed or _is_exiting:
                raise GrammarError("the request has ended.")
            if self._num_taken < len(answer) and started_s - begun_s > SLICE_S:
                return False
        return True

    def _charge(self, seconds: float, num_tokens: int) -> None:
        self._spent_s += seconds
        self._budget.check(self._spent_s, num_tokens)


def _key(answer: Tokens) -> tuple[int, int]:
    """Return a key that distinguishes answers of one request: they grow, and only the newest token
    is ever redrawn."""
    return len(answer), int(answer[-1]) if len(answer) else -1


def _lower_priority() -> None:
    """Lower the priority of the thread, if the system has priorities of threads."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        lower = min(os.getpriority(os.PRIO_PROCESS, thread) + NICENESS, 19)
        os.setpriority(os.PRIO_PROCESS, thread, lower)


_local = threading.local()
"""``executor`` of each thread."""
_running: set[GrammarThreads] = set()
_is_exiting = False


@atexit.register
def _stop_all() -> None:
    """End all threads inside the library when the interpreter ends."""
    global _is_exiting
    _is_exiting = True
    for threads in tuple(_running):
        threads.stop()
