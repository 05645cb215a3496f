"""Continuations of a prompt, compared with all texts that the cache has seen."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.plugins.speculation.suffix import MAX_BRANCHES, following
from hybridcache.cache import HybridRadixCache
from hybridcache.tokens import Tokens
from tests.cache.serving import hybrid

texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=6)


def make(kind: str, page_size: int, num_kv_tokens: int = 400) -> HybridRadixCache:
    num_slots = 0 if kind == "radix" else 4
    return hybrid(num_kv_tokens, num_slots, prefix_cache=kind, grid=4, page_size=page_size)


def insert(cache: HybridRadixCache, tokens: list[int], namespace: str | None = None) -> None:
    whole = len(tokens) - len(tokens) % cache.page_size
    rows = cache.allocate_kv(-(-len(tokens) // cache.page_size) * cache.page_size)
    assert rows is not None
    ids = np.array(tokens, np.int32)
    result = cache.insert(ids, rows[: len(ids)], (), namespace)
    cache.free_kv(np.concatenate([result.duplicates, rows[whole:]]))


def continuation(cache: HybridRadixCache, tokens: Tokens, max_tokens: int) -> Tokens:
    return following(cache.page_size, cache.root(), tokens, max_tokens)


@given(
    inserted=texts,
    prompt=st.lists(st.integers(0, 2), max_size=10),
    kind=st.sampled_from(["hybrid", "radix"]),
    page_size=st.sampled_from([1, 2, 4]),
    max_tokens=st.integers(1, 9),
    evicted=st.booleans(),
)
def test_a_continuation_follows_an_inserted_text_and_changes_nothing(
    inserted: list[list[int]],
    prompt: list[int],
    kind: str,
    page_size: int,
    max_tokens: int,
    evicted: bool,
) -> None:
    cache = make(kind, page_size)
    for tokens in inserted:
        insert(cache, tokens)
    if evicted:
        cache.evict(num_tokens=7)
    ids, before = np.array(prompt, np.int32), cache.render()
    found = continuation(cache, ids, max_tokens).tolist()
    assert cache.render() == before
    whole = [tokens[: len(tokens) - len(tokens) % page_size] for tokens in inserted]
    longer = [t for t in whole if t[: len(prompt)] == prompt and len(t) > len(prompt)]
    assert bool(found) == bool(longer)
    assert not found or any(t[len(prompt) :][: len(found)] == found for t in longer)
    if found and len(found) < max_tokens:
        assert prompt + found in whole
    cache.check(held_tokens=0)


def test_the_most_recently_used_continuation_is_chosen() -> None:
    cache = make("radix", 1)
    insert(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    insert(cache, [1, 2, 30, 40, 50, 60])
    ids = np.array([1, 2], np.int32)
    assert continuation(cache, ids, 2).tolist() == [30, 40]
    cache.touch(cache.match(np.array([1, 2, 3, 4, 5], np.int32)))
    assert continuation(cache, ids, 2).tolist() == [3, 4]


def test_at_most_max_branches_are_compared_newest_first() -> None:
    cache = make("radix", 1)
    texts = [[1, number, 1000 + number, 7] for number in range(MAX_BRANCHES + 6)]
    for tokens in texts:
        insert(cache, tokens)
    cache.touch(cache.match(np.array([*texts[0], 0], np.int32)))
    start = np.array([1], np.int32)
    assert continuation(cache, start, 3).tolist() == texts[-1][1:]
    cache.evict(num_tokens=400)
    assert cache.cached_tokens == 0
    for tokens in texts:  # the second token selects the branch
        assert continuation(cache, np.array(tokens[:2], np.int32), 2).tolist() == tokens[2:]
