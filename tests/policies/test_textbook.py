"""Ours against the papers' own pseudocode, on pages of one size; and what theory says of more
memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.policies.registry import EVICTION
from tests.policies import textbook
from tests.policies.items import FakeItem, Shelf

PRINTED: dict[str, Callable[[str, int], str]] = {
    "fifo": textbook.fifo,
    "lru": textbook.lru,
    "clock": textbook.clock,
    "sieve": textbook.sieve,
    "lfu": textbook.lfu_da,
    "2q": textbook.two_queue,
    "slru": textbook.slru,
    "s3-fifo": textbook.s3_fifo,
    "arc": textbook.arc,
    "w-tinylfu": textbook.w_tiny_lfu,
}

asked = st.text("abcdef", max_size=80)


@pytest.mark.parametrize("word", list(PRINTED))
@settings(max_examples=300)
@given(asked, st.integers(1, 6))
def test_evicts_what_the_paper_says(word: str, pages: str, capacity: int) -> None:
    assert Shelf(EVICTION[word](), capacity).ask(pages).gone == PRINTED[word](pages, capacity)


@pytest.mark.parametrize("word", sorted(EVICTION))
@given(asked, st.integers(1, 6), st.randoms(use_true_random=False))
def test_items_are_conserved_whatever_their_kinds_and_sizes(
    word: str, pages: str, capacity: int, random: object
) -> None:
    def make(name: str) -> FakeItem:
        kind = "kv" if name in "aceg" else "checkpoint"
        return FakeItem(
            name, kind=kind, size_bytes=ord(name) - 96, span=32 * (ord("i") - ord(name))
        )

    shelves = [Shelf(EVICTION[word](), capacity, make).ask(pages) for _ in range(2)]
    first, second = shelves
    assert first.gone == second.gone, "not deterministic"
    assert len(first.items) <= capacity
    assert len(first.gone) + len(first.items) + first.hits == len(pages)


@pytest.mark.parametrize("word", sorted(EVICTION))
@given(st.text("abcdefABC", max_size=80), st.integers(1, 6))
def test_items_are_conserved_while_some_are_locked(word: str, pages: str, capacity: int) -> None:
    shelf = Shelf(EVICTION[word](), capacity).ask(pages)
    asked = len(shelf.gone) + len(shelf.items) + shelf.hits + shelf.refused
    assert asked == len(pages) and len(shelf.items) <= capacity


@pytest.mark.parametrize("word", ["lru", "ttl", "tail-lru", "coverage"])
@given(asked, st.integers(1, 7))
def test_a_stack_algorithm_keeps_what_a_smaller_cache_keeps(
    word: str, pages: str, capacity: int
) -> None:
    """Items of one size, kind, label and span: all four order by the last use, and LRU has the
    inclusion property."""
    small, large = (Shelf(EVICTION[word](), size) for size in (capacity, capacity + 1))
    for page in pages:
        small.ask(page)
        large.ask(page)
        assert small.items.keys() <= large.items.keys()
    assert small.hits <= large.hits


def test_fifo_is_no_stack_algorithm() -> None:
    """Belady's anomaly, 1969: nine faults with three frames, ten with four."""
    pages = "123412512345"
    faults = [len(pages) - Shelf(EVICTION["fifo"](), frames).ask(pages).hits for frames in (3, 4)]
    assert faults == [9, 10]
