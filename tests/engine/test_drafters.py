"""Who guesses what, how long, and how a step's room is shared."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine import RequestSpec
from engine.drafts.drafting import Drafting, Source
from engine.drafts.odds import Luck, Odds
from engine.drafts.pace import MAX_IDLE, MAX_MISSES, MAX_REST, MIN_REST, Pace
from engine.drafts.suffix import SIZES, SuffixIndex
from engine.requests.request import Request


@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 60), max_size=4),
    max_tokens=st.integers(1, 9),
)
def test_a_suffix_is_looked_up_as_by_reading(
    tokens: list[int], cuts: list[int], max_tokens: int
) -> None:
    """However the text grew: the latest run of six equal tokens, else of three, that something
    followed."""
    index, ids = SuffixIndex(), np.array(tokens, np.int32)
    for cut in sorted(cuts):
        index.continuation(ids[: min(cut, len(ids))], 1)
    expected: list[int] = []
    for size in SIZES:
        ends = [
            end
            for end in range(size, len(tokens))
            if len(tokens) >= size and tokens[end - size : end] == tokens[-size:]
        ]
        if ends:
            period = tokens[ends[-1] :]
            expected = [period[i % len(period)] for i in range(max_tokens)]
            break
    assert index.continuation(ids, max_tokens).tolist() == expected


def test_a_pace_that_is_never_right_hardly_tries() -> None:
    pace, tried = Pace(8), []
    for step in range(20_000):
        length = pace.next()
        if length:
            tried.append((step, length))
            pace.learn(length, 0)
    assert tried[0] == (0, 4) and all(length == 1 for _, length in tried[1:])
    assert tried[MAX_MISSES][0] - tried[MAX_MISSES - 1][0] == MIN_REST + 1
    assert tried[-1][0] - tried[-2][0] == MAX_REST + 1
    assert len(tried) < 60


def test_a_pace_recovers_with_the_first_that_is_right() -> None:
    pace = Pace(8)
    for _ in range(MAX_MISSES):
        pace.learn(pace.next(), 0)
    assert [pace.next() for _ in range(MIN_REST)] == [0] * MIN_REST
    lengths = []
    for _ in range(5):
        lengths.append(pace.next())
        pace.learn(lengths[-1], lengths[-1])
    assert lengths == [1, 2, 4, 8, 8]
    pace.learn(8, 3)
    assert pace.next() == 4


def test_a_drafter_that_has_nothing_is_asked_less() -> None:
    pace, asked = Pace(8), []
    for step in range(20):
        if pace.next():
            asked.append(step)
            pace.learn(0, 0)
    assert asked == [0, 1, 3, 7, 11, 15, 19]
    assert [pace.next() for _ in range(MAX_IDLE)] == [0] * (MAX_IDLE - 1) + [4]
    pace.learn(4, 2)
    assert pace.next() == 3
    pace.learn(0, 0)
    assert pace.next() == 3


def test_a_new_request_begins_with_the_luck_of_others() -> None:
    luck = Luck()
    tries = []
    for _ in range(8):
        odds, num_tries = Odds(3, luck), 0
        for _ in range(200):
            length = odds.next()
            num_tries += length > 0
            odds.learn(length, 0)
        tries.append(num_tries)
    assert tries[0] == 8 and tries[-1] == 3
    # One that is always right is found out at its first try, and mends the luck of the next.
    odds, lengths = Odds(3, luck), []
    for _ in range(60):
        lengths.append(odds.next())
        odds.learn(lengths[-1], lengths[-1])
    assert lengths[: MIN_REST + 1] == [0] * MIN_REST + [1] and lengths[-1] == 3
    assert Odds(3, luck).next() > 0


class Ones:
    """As many ones as are asked for."""

    name = "ones"

    def propose(self, wanted: Any) -> list[np.ndarray]:
        return [np.ones(most, np.int32) for _, most in wanted]

    def forget(self, request: Request) -> None:
        pass


class Nothing(Ones):
    name = "nothing"

    def propose(self, wanted: Any) -> list[np.ndarray]:
        return [np.ones(0, np.int32) for _ in wanted]


def requests(count: int) -> list[Request]:
    return [
        Request(RequestSpec([1, 2]), arrival=i, arrival_s=0.0, max_len=99, seed=0)
        for i in range(count)
    ]


def test_a_full_step_gives_each_fewer() -> None:
    for count, lengths in [(1, [4]), (4, [4] * 4), (6, [2] * 6), (10, [1] * 10), (20, [1] * 10)]:
        sources = [Source(drafter, partial(Pace, 4)) for drafter in (Nothing(), Ones())]
        drafting = Drafting(sources, max_verified=20)
        drafts = drafting.propose([(request, 50) for request in requests(count)])
        assert [len(draft.tokens) for draft in drafts.values()] == lengths
        assert {draft.source for draft in drafts.values()} == {"ones"}
    drafting = Drafting([Source(Ones(), partial(Pace, 4))], max_verified=20)
    one, other = requests(2)
    drafts = drafting.propose([(one, 0), (other, 2)])
    assert [len(draft.tokens) for draft in drafts.values()] == [2] and other in drafts
    drafting.learn(other, drafts[other], 1)
    assert other.drafts.acceptance_len == 2.0
    assert other.drafts.drafted == {("ones", 1): 1, ("ones", 2): 1}
    assert other.drafts.accepted == {("ones", 1): 1}
    assert drafting.requests == {one, other}
    drafting.forget(one)
    assert drafting.requests == {other}
