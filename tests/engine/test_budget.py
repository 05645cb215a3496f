"""Tests of ``PrefillBudget``: its limits, and the share reserved for short prefills."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.config import MAX_SCORED, TILE
from hybridcache.scheduling.planner import PrefillBudget

sizes = st.one_of(st.integers(1, 300), st.integers(1, 5000))


@given(
    tokens=st.integers(TILE, 8192),
    is_shared=st.booleans(),
    prefills=st.lists(st.tuples(sizes, st.booleans()), max_size=20),
)
def test_prefills_never_exceed_the_budget(
    tokens: int, is_shared: bool, prefills: list[tuple[int, bool]]
) -> None:
    budget = PrefillBudget.of(tokens, is_shared=is_shared)
    taken = scored = 0
    for rest, scores in prefills:
        most = budget.most(rest, scores)
        assert 0 <= most <= rest
        if most < rest:  # A long prefill gets all tokens that are not reserved.
            left = tokens - taken - most
            assert left >= min(budget.num_for_short, tokens - taken)
            assert left == budget.num_for_short or most == 0 or scored + most == MAX_SCORED
        assert most == 0 or budget.tiles > 0
        budget.spend(most, scores)
        taken, scored = taken + most, scored + most * scores
        assert (budget.tokens, budget.scored) == (tokens - taken, MAX_SCORED - scored)
        assert budget.tokens >= 0 and budget.scored >= 0


def test_a_step_begins_at_most_twice_the_tiles_that_its_budget_fills() -> None:
    budget = PrefillBudget.of(256, is_shared=True)
    for _ in range(8):
        assert budget.most(3, scores=False) == 3 and budget.room(scores=False) >= TILE
        budget.spend(3, scores=False)
    assert budget.is_spent and budget.tokens == 232
    assert budget.most(3, scores=False) == 0 == budget.room(scores=False)
    whole = PrefillBudget.of(256, is_shared=False)
    whole.spend(256, scores=False)
    assert whole.tiles == 4  # Whole tiles are never the limit.
