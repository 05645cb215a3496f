"""Compiles grammars for one vocabulary, and caches them."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.plugins.guided.bindings import (
    check_beginning,
    load_library,
    make_matcher,
    make_vocabulary,
)
from engine.plugins.guided.guide import Compiled, GrammarRule, Guide, Shared, StepTime
from engine.plugins.guided.marks import FreeText, MarkGuide, Overshoots
from engine.requests.grammar import Grammar, GrammarError

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

NUM_REMEMBERED = 64
"""Number of compiled grammars that are cached."""


class Guides:
    """Makes the guides of one engine. Safe to call from any thread."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        ends = frozenset() if tokenizer is None else tokenizer.eos_token_ids
        self.shared = Shared(
            num_mask_bytes=-(-vocab_size // 8),
            ends=np.array(sorted(ends), np.int32),
            step_time=StepTime(time.perf_counter()),
        )
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._overshoots: dict[tuple[bytes, ...], Overshoots] = {}

    def load(self) -> None:
        """Load the library and build its vocabulary, which would stop all threads later. Does
        nothing if guided answers are not available."""
        try:
            self._load()
        except GrammarError:
            return

    def compile(self, grammar: Grammar) -> None:
        """Compile ``grammar`` and cache it, so that ``rule`` is fast.

        Raises GrammarError if the library is missing, or the grammar is invalid, too large, or
        matches only the empty answer. Raises TooComplex if its first two tokens take too much time.
        """
        if grammar.marks:
            self._overshoots_of(grammar)
        for _, part in _parts(grammar):
            self._compiled_of(part)

    def rule(self, grammar: Grammar) -> GrammarRule:
        """Return the guide of a new answer. Raises GrammarError as ``compile``, and compiles the
        grammar if it is not cached."""
        make = {
            mark: partial(Guide, self._compiled_of(part), self.shared)
            for mark, part in _parts(grammar)
        }
        if not grammar.marks:
            return make[b""]()
        assert self._tokenizer is not None
        overshoots = self._overshoots_of(grammar)
        thinks = grammar.end_of_reasoning is not None
        free = FreeText(overshoots.marks, thinks=thinks, may_think=grammar.may_think)
        return MarkGuide(free, make, overshoots, self._tokenizer.token_bytes)

    def _compiled_of(self, grammar: Grammar) -> Compiled:
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known
        # Outside the lock: it may take a tenth of a second, and other threads compile too.
        compiled = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = compiled
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > NUM_REMEMBERED:
                self._compiled.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar) -> Compiled:
        library, vocabulary = self._load()
        compiled = Compiled(partial(make_matcher, library, vocabulary, grammar))
        check_beginning(compiled.matcher, self.shared.ends)
        return compiled

    def _overshoots_of(self, grammar: Grammar) -> Overshoots:
        self._load()
        assert self._tokenizer is not None
        marks = tuple(mark for mark, _ in _parts(grammar))
        found = self._overshoots.get(marks)
        if found is None:
            found = Overshoots(marks, self._tokenizer, self._vocab_size)
            self._overshoots[marks] = found
        return found

    def _load(self) -> tuple[Any, Any]:
        library = load_library()
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = make_vocabulary(library, self._tokenizer, self._vocab_size)
            return library, self._vocabulary


def _parts(grammar: Grammar) -> Iterator[tuple[bytes, Grammar]]:
    """Yield the parts of ``grammar`` to compile: one per mark, or all of it without marks."""
    if not grammar.marks:
        yield b"", grammar
    for mark, text in grammar.marks:
        yield mark.encode(), Grammar("lark", text)
