"""Counts of an answer's tokens, kept as it grows, against counting it anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.requests.request import Request
from engine.requests.sampling_params import SamplingParams
from engine.requests.spec import RequestSpec
from engine.requests.token_counts import TokenCounts
from engine.text.outputs import SampledToken

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


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"repetition_penalty": 1.2}, {7: 2, 9: 0}),
        ({"presence_penalty": 0.5}, {7: 2}),
    ],
)
def test_a_request_counts_its_answer_and_where_repetitions_cost_its_prompt(
    rule: dict[str, float], expected: dict[int, int]
) -> None:
    request = Request(
        RequestSpec(np.array([7, 9], np.int32), SamplingParams(**rule)),
        arrival=0,
        arrival_s=0.0,
        max_len=9,
        seed=0,
    )
    request.sampling_inputs(request.tokens[:0])
    for _ in range(2):
        request.num_drawn += 1
        request.accept(SampledToken(7, None), 0.0)
        (one,) = request.sampling_inputs(request.tokens[:0])
        counts = one.counts
    assert dict(zip(counts.ids.tolist(), counts.numbers.tolist(), strict=True)) == expected


def test_counts_ahead_are_those_of_a_longer_answer() -> None:
    prompt, answer = np.array([7, 9, 7], np.int32), np.array([9, 4, 4, 1, 9], np.int32)
    counts = TokenCounts(prompt)
    counts.count(answer[:2])
    ahead = counts.ahead(answer[2:])
    ahead.check(prompt, answer)
    counts.check(prompt, answer[:2])
