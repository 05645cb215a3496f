"""Losses: every prompt token is a hit or has one loss cause, and the counters add them up."""

from __future__ import annotations

from hybridcache.radix.api import MAX_NAMESPACES, Losses, PrefixMatch, losses_of
from tests.radix.serving import hybrid, ids


def test_each_token_has_one_loss_cause_for_every_resume_position():
    """Check every split of a prompt of ten tokens, every refusal and every load."""
    for cached_len in range(9):
        rest = 10 - cached_len
        for seen in range(rest + 1):
            for placed in range(seen + 1):
                losses = Losses(rest - seen, seen - placed, placed // 2, 0, placed - placed // 2)
                found = PrefixMatch(10, cached_len, 0, 0, losses, None, None)
                for resumed_len in range(10):
                    for loadable_len in range(10):
                        actual = losses_of(found, resumed_len, loadable_len)
                        assert sum(actual) + resumed_len == 10 and min(actual) >= 0
                        assert actual.refused == max(cached_len - resumed_len, 0)
                        deepest = max(cached_len, resumed_len)
                        assert actual.not_fetched == max(loadable_len - deepest, 0)


def test_namespaces_past_the_limit_are_counted_together_except_those_in_use():
    cache = hybrid(num_kv_tokens=10)
    for number in range(2 * MAX_NAMESPACES):
        cache.touch(cache.match(ids("hello"), "hot"))
        cache.touch(cache.match(ids("hello"), number))
    assert cache.stats.by_namespace["hot"].requests == 2 * MAX_NAMESPACES
    assert cache.stats.total.requests == 4 * MAX_NAMESPACES
    assert len(cache.stats.by_namespace) == MAX_NAMESPACES
    assert cache.stats.others.requests == MAX_NAMESPACES + 1
