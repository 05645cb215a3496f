"""SegLen, compared with a plain version that computes every score for every victim."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybridcache.policies.eviction.marconi import SegLen
from tests.policies.items import FakeItem, offer


def normalised(values: list[int]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def scores(left: dict[str, tuple[int, int]], weight: float) -> dict[str, float]:
    """Return the score of each name, given (replay length, last use) of all candidates."""
    lengths, uses = (normalised(list(column)) for column in zip(*left.values(), strict=True))
    return {
        name: weight * length + (1 - weight) * use
        for name, length, use in zip(left, lengths, uses, strict=True)
    }


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12),
    st.sampled_from([0.0, 0.5, 0.85]),
)
def test_every_victim_has_the_lowest_score(values: list[tuple[int, int]], weight: float) -> None:
    left = {str(number): value for number, value in enumerate(values)}
    items = [FakeItem(name, span=span, last_used=used) for name, (span, used) in left.items()]
    order = offer(SegLen(weight), *items)
    assert sorted(order) == sorted(left)
    for name in order:
        current = scores(left, weight)
        assert current[name] <= min(current.values()) + 1e-9
        del left[name]
