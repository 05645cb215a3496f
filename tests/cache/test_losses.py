"""Losses: every prompt token is a hit or has one loss cause, and the counters add them up."""

from __future__ import annotations

import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.api import MAX_NAMESPACES, Losses, PrefixMatch, losses_of
from tests.cache.serving import (
    hybrid,
    ids,
    publish,
    serve,
    traffic,
)


def test_touch_counts_the_refused_tokens_of_a_changed_match():
    cache = hybrid()
    serve(cache, ids("hello"), [5])
    match = cache.match(ids("hello!"))
    refused = match._replace(
        cached_len=0, checkpoint=None, node=None, losses=losses_of(match, 0), resumed=None
    )
    cache.touch(refused)
    assert cache.stats.total.refused == 5


def test_a_refused_checkpoint_does_not_count_as_missed():
    """The deeper checkpoint was evicted and the shallower one refused, so only the tokens between
    them were missed."""
    cache = hybrid(demote_superseded=False, eviction="lru")
    serve(cache, ids("abcd"), [2, 4])
    cache.touch(cache.match(ids("abX")))
    cache.evict(num_slots=1)
    cache.stats.clear()
    match = cache.match(ids("abcdX"))
    assert (match.cached_len, match.missed.position) == (2, 4)
    cache.touch(match._replace(cached_len=0, node=None, losses=losses_of(match, 0)))
    assert (cache.stats.total.missed_tokens, cache.stats.total.refused) == (2, 2)


def test_each_token_has_one_loss_cause_for_every_resume_position():
    """Check every split of a prompt of ten tokens, every refusal and every load."""
    for cached_len in range(9):
        rest = 10 - cached_len
        for seen in range(rest + 1):
            for placed in range(seen + 1):
                losses = Losses(rest - seen, seen - placed, placed // 2, 0, placed - placed // 2)
                found = PrefixMatch(10, cached_len, 0, 0, None, losses, None, None)
                for resumed_len in range(10):
                    for loadable_len in range(10):
                        actual = losses_of(found, resumed_len, loadable_len)
                        assert sum(actual) + resumed_len == 10 and min(actual) >= 0
                        assert actual.refused == max(cached_len - resumed_len, 0)
                        deepest = max(cached_len, resumed_len)
                        assert actual.not_fetched == max(loadable_len - deepest, 0)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("grid", [1, 16])
@pytest.mark.parametrize("prefix_cache", ["hybrid", "radix", "none"])
def test_hits_and_losses_always_sum_to_the_prompt(prefix_cache, page_size, grid):
    cache = build_prefix_cache(
        CacheConfig(
            prefix_cache=prefix_cache,
            num_kv_tokens=960,
            num_slots=6,
            page_size=page_size,
            grid=grid,
            ghost_bytes=10_000,
        )
    )
    step = max(page_size, grid)
    num_tokens = 0
    for number, tokens in enumerate(traffic(3, 150)):
        n = len(tokens)
        num_tokens += n
        serve(cache, tokens, sorted({n // step * step, n // 2 // step * step} - {0}), number % 2)
    total = cache.stats.total
    losses = (
        total.never_seen
        + total.kv_evicted
        + total.checkpoint_evicted
        + total.never_checkpointed
        + total.below_grid
        + total.refused
    )
    assert total.prompt_tokens == num_tokens == total.cached_tokens + losses
    assert total.requests == 150 == sum(u.requests for u in cache.stats.by_namespace.values())


def test_namespaces_are_counted_separately():
    cache = hybrid()
    serve(cache, ids("hello"), [4], namespace="a")
    serve(cache, ids("hello"), [4], namespace="a")
    serve(cache, ids("hello"), [4], namespace="b")
    a, b = cache.stats.by_namespace["a"], cache.stats.by_namespace["b"]
    assert (a.requests, a.hits, a.cached_tokens, a.token_hit_rate) == (2, 1, 4, 0.4)
    assert (b.requests, b.hits, b.request_hit_rate) == (1, 0, 0.0)
    assert cache.stats.token_hit_rate == 4 / 15


def test_namespaces_past_the_limit_are_counted_together():
    cache = hybrid(num_kv_tokens=10)
    for number in range(MAX_NAMESPACES + 100):
        cache.touch(cache.match(ids("hello"), number))
    assert len(cache.stats.by_namespace) == MAX_NAMESPACES
    assert cache.stats.total.requests == MAX_NAMESPACES + 100
    assert cache.stats.others.requests == 100


def test_a_namespace_in_use_keeps_its_own_counters():
    cache = hybrid(num_kv_tokens=10)
    for number in range(2 * MAX_NAMESPACES):
        cache.touch(cache.match(ids("hello"), "hot"))
        cache.touch(cache.match(ids("hello"), number))
    assert cache.stats.by_namespace["hot"].requests == 2 * MAX_NAMESPACES
    assert cache.stats.total.requests == 4 * MAX_NAMESPACES


def test_inserted_minus_evicted_equals_the_cached_amount():
    cache = hybrid(num_kv_tokens=300, num_slots=4)
    for tokens in traffic(5, 60):
        serve(cache, tokens, [len(tokens)])
    stats = cache.stats
    assert stats.inserted_tokens - stats.evicted_tokens == cache.cached_tokens
    assert stats.inserted_slots - stats.evicted_slots == cache.num_checkpoints
    assert stats.as_dict()["evictions"] == stats.evictions > 0
    publish(cache, ids("x"))
