"""Counts of an answer's tokens, kept as it grows, against counting it anew."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.requests.token_counts import TokenCounts

tokens = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 400)), max_size=150)


class TokenCountsMachine(RuleBasedStateMachine):
    @initialize(prompt=tokens)
    def start(self, prompt: list[int]) -> None:
        self.prompt, self.output = np.array(prompt, np.int32), np.empty(0, np.int32)
        self.counts = TokenCounts(self.prompt)

    @rule(new=tokens)
    def grow(self, new: list[int]) -> None:
        self.output = np.concatenate([self.output, np.array(new, np.int32)])
        self.counts.count(self.output)

    @invariant()
    def is_what_counting_anew_gives(self) -> None:
        self.counts.check(self.prompt, self.output)


TestTokenCounts = TokenCountsMachine.TestCase
