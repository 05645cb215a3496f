"""Continuations of a prompt, compared with all texts that the cache has seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.plugins.speculation.drafters import MAX_BRANCHES, following
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.tokens import Tokens
from tests.radix.serving import hybrid, ids, publish

texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=6)


def make(kind: str, page_size: int, num_kv_tokens: int = 400) -> HybridRadixCache:
    num_slots = 0 if kind == "radix" else 4
    return hybrid(num_kv_tokens, num_slots, prefix_cache=kind, grid=4, page_size=page_size)


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
        publish(cache, ids(tokens))
    if evicted:
        cache.evict(num_tokens=7)
    before = cache.render()
    found = continuation(cache, ids(prompt), max_tokens).tolist()
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
    publish(cache, ids(range(1, 10)))
    publish(cache, ids([1, 2, 30, 40, 50, 60]))
    start = ids([1, 2])
    assert continuation(cache, start, 2).tolist() == [30, 40]
    cache.touch(cache.match(ids(range(1, 6))))
    assert continuation(cache, start, 2).tolist() == [3, 4]


def test_at_most_max_branches_are_compared_newest_first() -> None:
    cache = make("radix", 1)
    texts = [[1, number, 1000 + number, 7] for number in range(MAX_BRANCHES + 6)]
    for tokens in texts:
        publish(cache, ids(tokens))
    cache.touch(cache.match(ids(texts[0], [0])))
    start = ids([1])
    assert continuation(cache, start, 3).tolist() == texts[-1][1:]
    cache.evict(num_tokens=400)
    assert cache.cached_tokens == 0
    for tokens in texts:  # the second token selects the branch
        assert continuation(cache, ids(tokens[:2]), 2).tolist() == tokens[2:]
