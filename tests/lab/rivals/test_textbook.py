"""Queue policies, compared with the pseudocode of their papers on pages of equal size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.lab.rivals.evictions import ALL_NAMES
from tests.lab.rivals import textbook
from tests.policies.items import FakeItem, ItemCache

REFERENCES: dict[str, Callable[[str, int], str]] = {
    "fifo": textbook.fifo,
    "lru": textbook.lru,
    "clock": textbook.clock,
    "sieve": textbook.sieve,
    "lfu": textbook.lfu_da,
    "s3-fifo": textbook.s3_fifo,
    "arc": textbook.arc,
    "w-tinylfu": textbook.w_tiny_lfu,
}

requests = st.text("abcdef", max_size=80)


@pytest.mark.parametrize("eviction", list(REFERENCES))
@settings(max_examples=300)
@given(requests, st.integers(1, 6))
def test_victims_match_the_pseudocode_of_the_paper(
    eviction: str, pages: str, capacity: int
) -> None:
    assert ItemCache(ALL_NAMES[eviction].make(), capacity).serve(pages).evicted == REFERENCES[
        eviction
    ](pages, capacity)


@pytest.mark.parametrize("eviction", sorted(ALL_NAMES))
@given(st.text("abcdefABC", max_size=80), st.integers(1, 6))
def test_items_of_any_kind_and_size_are_conserved(eviction: str, pages: str, capacity: int) -> None:
    """Capital letters lock their item for a while."""

    def make(name: str) -> FakeItem:
        kind = "kv" if name in "aceg" else "checkpoint"
        return FakeItem(name, kind=kind, size_bytes=ord(name) - 96, span=32 * (105 - ord(name)))

    first, second = (
        ItemCache(ALL_NAMES[eviction].make(), capacity, make).serve(pages) for _ in "ab"
    )
    assert first.evicted == second.evicted, "the policy is not deterministic"
    num_requests = len(first.evicted) + len(first.items) + first.hits + first.refused
    assert num_requests == len(pages) and len(first.items) <= capacity
