"""Compiles grammars for one vocabulary, caches them, and follows answers that have a grammar only
after a mark, such as the one that opens a tool call.

Before a mark, and after the text that its grammar allows, an answer is free and costs nothing. Only
tokens that would complete a mark and continue after it are forbidden, so that a mark ends with a
token.

A grammar is compiled once, outside the engine's thread, and copied for each answer. Each mask is
computed in the step that draws with it. The library's limits end every call within milliseconds,
so the same grammars are refused on every machine. A request whose grammar takes more than its
share of the engine's time fails.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.plugins.guided.bindings import (
    check_beginning,
    load_library,
    make_matcher,
    make_vocabulary,
    reason,
)
from engine.requests.grammar import Grammar, GrammarError, TooComplex
from engine.requests.logit_rules import Draws, LogitRule, Mask, Ruling
from engine.text.answers import CLOSE, OPEN
from hybridcache.tokens import EMPTY, Tokens

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

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
        """Copy the matcher for the first token only, so queued requests do not have one."""
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
        for is_repeated in (False, True):
            self._go_to(answer)
            found = find()
            if not self._matcher.is_error():
                break
            message, self._matcher = self._matcher.get_error(), None
            if is_repeated or not message.startswith(SPENT_STATES):
                raise TooComplex(reason(message))
            # Other answers may have used up the states that all copies share.
            self._matcher, self._source = self._compiled.copy(self._source)
            self._num_taken = 0
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


THINK, END_THINK = OPEN.encode(), CLOSE.encode()


class Overshoots:
    """Tokens of one vocabulary that complete a mark and continue after it."""

    def __init__(self, marks: Sequence[bytes], tokenizer: Tokenizer, vocab_size: int) -> None:
        """Search the vocabulary. O(vocabulary)."""
        self.marks = tuple(marks)
        self._vocab_size = vocab_size
        self._always: list[int] = []
        self._behind: dict[bytes, list[int]] = {}
        """Tokens by the rest of a mark with which they begin."""
        self._masks: dict[tuple[bytes, ...], Mask] = {}
        lasts = {mark[-1:] for mark in marks}
        for token in range(min(vocab_size, tokenizer.vocab_size)):
            text = tokenizer.token_bytes(token)
            if len(text) < 2 or not any(last in text for last in lasts):
                continue
            for head in (text[:end] for end in range(1, len(text))):
                for mark in self.marks:
                    if mark.endswith(head):
                        self._behind.setdefault(head, []).append(token)
                    if head.endswith(mark):
                        self._always.append(token)

    def mask(self, text: bytes) -> Mask | None:
        """Return the mask after ``text``, the end of the free part of an answer, or None if every
        token is allowed."""
        rests = tuple(
            mark[size:]
            for mark in self.marks
            for size in range(1, len(mark))
            if text.endswith(mark[:size]) and mark[size:] in self._behind
        )
        if not rests and not self._always:
            return None
        if rests not in self._masks:
            allowed = np.ones(-(-self._vocab_size // 8) * 8, np.uint8)
            allowed[self._always] = 0
            for rest in rests:
                allowed[self._behind[rest]] = 0
            self._masks[rests] = np.packbits(allowed, bitorder="little")
        return self._masks[rests]


class FreeText:
    """End of the free part of an answer, as far as it affects the next token."""

    __slots__ = ("_longest", "_marks", "_may_think", "_thinks", "text")

    def __init__(self, marks: Sequence[bytes], *, thinks: bool, may_think: bool) -> None:
        """``thinks``: the answer begins inside reasoning; ``may_think``: possibly with it."""
        self._marks = marks
        self._longest = max(len(text) for text in (*marks, THINK, END_THINK))
        self._thinks = thinks
        self._may_think = may_think and not thinks
        self.text = b""
        """End of the text that may be the beginning of a mark."""

    def copy(self) -> FreeText:
        other = FreeText(self._marks, thinks=self._thinks, may_think=self._may_think)
        other.text = self.text
        return other

    @property
    def is_reasoning(self) -> bool:
        """True if marks are ignored so far."""
        return self._thinks or self._may_think

    def add(self, text: bytes) -> bytes | None:
        """Append ``text``. Returns the mark with which the text ends, or None."""
        self.text += text
        if self._may_think:
            begin = self.text.lstrip()
            if len(begin) < len(THINK) and THINK.startswith(begin):
                return None
            self._thinks, self._may_think = begin.startswith(THINK), False
        if self._thinks:
            at = self.text.find(END_THINK)
            if at < 0:
                self.text = self.text[1 - self._longest :]
                return None
            self._thinks, self.text = False, self.text[at + len(END_THINK) :]
        found = next((mark for mark in self._marks if self.text.endswith(mark)), None)
        self.text = self.text[1 - self._longest :]
        return found


class MarkGuide(GrammarRule):
    """Follows an answer that is free except after marks."""

    def __init__(
        self,
        free: FreeText,
        make: Mapping[bytes, Callable[[], Guide]],
        overshoots: Overshoots,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        """``make`` has a function for each mark, which makes the guide of the text after it."""
        self._make = make
        self._overshoots = overshoots
        self._token_bytes = token_bytes
        self._free, self._begin = free, free.copy()
        """The free text so far, and its state at ``_free_from``."""
        self._free_from = self._num_read = 0
        self._call: tuple[int, Guide] | None = None
        """Start of the text after a mark, and its guide."""
        self._last_call: tuple[int, Guide] | None = None
        """The previous call, which the newest token has ended; that token may be taken back."""

    def masks(self, answer: Tokens, drafts: Tokens = EMPTY) -> list[Mask | GrammarError | None]:
        try:
            self._read(answer)
        except GrammarError as error:
            return [error] * (1 + len(drafts))
        if self._call is not None:
            start, guide = self._call
            masks = guide.masks(answer[start:], drafts)
            with suppress(GrammarError):
                if len(drafts) and guide.is_done(np.concatenate([answer[start:], drafts])):
                    masks[-1] = self._overshoots.mask(b"")
            return masks
        free = self._free.copy()
        masks = [self._free_mask(free)]
        for token in drafts.tolist():
            mark = free.add(self._token_bytes(token))
            if mark is not None:
                return [*masks, *self._make[mark]().masks(EMPTY)]
            masks.append(self._free_mask(free))
        return masks

    def possible(self, answer: Tokens, drafts: Tokens) -> Tokens:
        """See ``LogitRule``. Drafts end where a mark, or the text after one, ends."""
        try:
            self._read(answer)
            if self._call is not None:
                start, guide = self._call
                drafts = guide.possible(answer[start:], drafts)
                for size in range(1, len(drafts) + 1):
                    if guide.is_done(np.concatenate([answer[start:], drafts[:size]])):
                        return drafts[:size]
                return drafts
        except GrammarError:
            return drafts[:0]
        free = self._free.copy()
        for size, token in enumerate(drafts.tolist()):
            mask = self._free_mask(free)
            if mask is not None and not mask[token >> 3] >> (token & 7) & 1:
                return drafts[:size]
            if free.add(self._token_bytes(token)) is not None:
                return drafts[: size + 1]
        return drafts

    def is_done(self, answer: Tokens) -> bool:
        """Return False: a free answer may always continue. Raises as ``Guide.is_done``."""
        self._read(answer)
        return False

    def _free_mask(self, free: FreeText) -> Mask | None:
        return None if free.is_reasoning else self._overshoots.mask(free.text)

    def _read(self, answer: Tokens) -> None:
        """Read ``answer``. Raises TooComplex as ``Guide.is_done``."""
        if len(answer) < self._num_read:
            self._go_back(len(answer))
        while self._num_read < len(answer):
            end = self._num_read + 1
            if self._call is not None:
                start, guide = self._call
                if guide.is_done(answer[start:end]):
                    self._last_call, self._call = self._call, None
                    self._free = FreeText(self._overshoots.marks, thinks=False, may_think=False)
                    self._begin, self._free_from = self._free.copy(), end
            else:
                mark = self._free.add(self._token_bytes(int(answer[end - 1])))
                if mark is not None:
                    self._call = end, self._make[mark]()
                elif end > self._free_from + 1:
                    self._last_call = None
            self._num_read = end

    def _go_back(self, length: int) -> None:
        """Go back to ``length``, because the newest token was taken back."""
        if self._call is not None and self._call[0] > length:
            self._call = None
        if self._call is None and length < self._free_from:
            assert self._last_call is not None, "more than the newest token was taken back"
            self._call, self._last_call = self._last_call, None
        if self._call is None:
            self._free, length = self._begin.copy(), self._free_from
        self._num_read = length


NUM_REMEMBERED = 64
"""Number of compiled grammars that are cached."""


class Guides:
    """Makes the guides of one engine. Safe to call from any thread."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        ends = frozenset() if tokenizer is None else tokenizer.eos_token_ids
        self.shared = Shared(
            -(-vocab_size // 8), np.array(sorted(ends), np.int32), time.perf_counter()
        )
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._overshoots: dict[tuple[bytes, ...], Overshoots] = {}

    def rule(self, grammar: Grammar) -> GrammarRule:
        """Return the guide of a new answer, and compile the grammar if it is not cached.

        Raises GrammarError if the library is missing, or the grammar is invalid, too large, or
        matches only the empty answer. Raises TooComplex if its beginning takes too much time.
        """
        make = {
            mark: partial(Guide, self._compiled_of(part), self.shared)
            for mark, part in _parts(grammar)
        }
        if not grammar.marks:
            return make[b""]()
        assert self._tokenizer is not None
        marks = tuple(make)
        overshoots = self._overshoots.get(marks)
        if overshoots is None:
            overshoots = Overshoots(marks, self._tokenizer, self._vocab_size)
            self._overshoots[marks] = overshoots
        thinks = grammar.end_of_reasoning is not None
        free = FreeText(overshoots.marks, thinks=thinks, may_think=grammar.may_think)
        return MarkGuide(free, make, overshoots, self._tokenizer.token_bytes)

    def _compiled_of(self, grammar: Grammar) -> Compiled:
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known
        library = load_library()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = make_vocabulary(library, self._tokenizer, self._vocab_size)
        # Outside the lock: it may take a tenth of a second, and other threads compile too.
        compiled = Compiled(partial(make_matcher, library, self._vocabulary, grammar))
        check_beginning(compiled.matcher, self.shared.ends)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > NUM_REMEMBERED:
                self._compiled.popitem(last=False)
        return compiled


def _parts(grammar: Grammar) -> Iterator[tuple[bytes, Grammar]]:
    """Yield the parts of ``grammar`` to compile: one per mark, or all of it without marks."""
    if not grammar.marks:
        yield b"", grammar
    for mark, text in grammar.marks:
        yield mark.encode(), Grammar("lark", text)
