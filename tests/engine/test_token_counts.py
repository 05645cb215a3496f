"""Tests of token counts that grow with an answer, compared with a new count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.requests.logit_rules import FREE, Draws, Penalties, TokenCounts

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
        self.counts.count(self.output)

    @invariant()
    def equals_a_new_count(self) -> None:
        self.counts.check(self.prompt, self.output)


TestTokenCounts = TokenCountsMachine.TestCase


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ((1.2, 0.0, 0.0), {7: (1.2, 0.0), 9: (1.2, 0.0)}),
        ((1.0, 0.5, 0.25), {7: (1.0, 1.0), 4: (1.0, 0.0)}),
    ],
)
def test_only_the_repetition_penalty_includes_the_prompt(
    costs: tuple[float, float, float], expected: dict[int, tuple[float, float]]
) -> None:
    prompt, rules = np.array([7, 9], np.int32), []
    penalties = Penalties(prompt, *costs)
    answer, drafts = np.array([7, 7], np.int32), np.array([4], np.int32)
    for length in range(3):
        rules = penalties.apply(Draws(length, answer[:length], drafts), [FREE] * 2)
    for ruling, number in zip(rules, (0, 1), strict=True):
        assert ruling.repeats is not None and ruling.repeats.num_seen == 2 + number
    ids, numbers, _ = rules[0].repeats
    found = dict(zip(ids.tolist(), zip(*numbers.tolist(), strict=True), strict=True))
    assert found == {token: cost for token, cost in expected.items() if token != 4}
    if costs[0] == 1.0:
        assert rules[1].repeats.ids.tolist() == [7, 4]
        assert rules[1].repeats.numbers[1].tolist() == [1.0, 0.75]


def test_counts_ahead_equal_those_of_the_longer_answer() -> None:
    prompt, answer = np.array([7, 9, 7], np.int32), np.array([9, 4, 4, 1, 9], np.int32)
    counts = TokenCounts(prompt)
    counts.count(answer[:2])
    ahead = counts.ahead(answer[2:])
    ahead.check(prompt, answer)
    counts.check(prompt, answer[:2])
