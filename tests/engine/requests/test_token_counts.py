"""Tests of token counts that grow with an answer, compared with a new count."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.requests.logit_rules import TokenCounts

tokens = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 400)), max_size=150)


class TokenCountsMachine(RuleBasedStateMachine):
    """State machine of an answer that grows."""

    @initialize(prompt=tokens)
    def start(self, prompt: list[int]) -> None:
        self.prompt, self.output = np.array(prompt, np.int32), np.empty(0, np.int32)
        self.counts = TokenCounts(self.prompt)

    @rule(new=tokens)
    def grow(self, new: list[int]) -> None:
        self.output = np.concatenate([self.output, np.array(new, np.int32)])
        self.counts.add(np.array(new, np.int32))

    @invariant()
    def equals_a_new_count(self) -> None:
        check(self.counts, self.prompt, self.output)


def check(counts: TokenCounts, prompt: np.ndarray, output: np.ndarray) -> None:
    tokens, numbers = np.unique(output, return_counts=True)
    expected = dict.fromkeys(np.unique(prompt).tolist(), 0)
    expected |= dict(zip(tokens.tolist(), numbers.tolist(), strict=True))
    assert dict(zip(counts.ids.tolist(), counts.numbers.tolist(), strict=True)) == expected


TestTokenCounts = TokenCountsMachine.TestCase


def test_counts_ahead_equal_those_of_the_longer_answer() -> None:
    prompt, answer = np.array([7, 9, 7], np.int32), np.array([9, 4, 4, 1, 9], np.int32)
    counts = TokenCounts(prompt)
    counts.add(answer[:2])
    ahead = counts.ahead(answer[2:])
    check(ahead, prompt, answer)
    check(counts, prompt, answer[:2])
