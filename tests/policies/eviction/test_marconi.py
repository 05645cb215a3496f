"""Marconi, compared with a plain version that computes every score for every victim."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hybridcache.policies.eviction.marconi import ATTENTION_TOKENS, Marconi
from tests.policies.items import FakeItem, offer


def normalised(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def scores(left: dict[str, FakeItem], alpha: float) -> dict[str, float]:
    """Return the score of each name among all candidates."""
    recency = normalised([item.last_used for item in left.values()])
    saved = normalised(
        [
            sum(1 + at / ATTENTION_TOKENS for at in (item.position - item.span, item.position))
            * item.span
            / item.size_bytes
            for item in left.values()
        ]
    )
    pairs = zip(recency, saved, strict=True)
    return {name: used + alpha * flops for name, (used, flops) in zip(left, pairs, strict=True)}


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(1, 9)), max_size=12),
    st.sampled_from([0.0, 0.5, 2.0]),
)
def test_every_victim_has_the_lowest_score(
    values: list[tuple[int, int, int]], alpha: float
) -> None:
    items = [
        FakeItem(str(n), span=span, position=4096, last_used=used, size_bytes=size)
        for n, (span, used, size) in enumerate(values)
    ]
    left = {item.name: item for item in items}
    order = offer(Marconi(alpha), *items)
    assert sorted(order) == sorted(left)
    for name in order:
        current = scores(left, alpha)
        assert current[name] <= min(current.values()) + 1e-9
        del left[name]
