"""Rules of the cache that its plain twin does not state: copies, costs, and the null cache.

``tests/plain_cache.py`` states the others, and the state machines compare every operation with it.
"""

from __future__ import annotations

import pytest

from hybridcache import CacheConfig
from tests.cache.serving import hybrid, ids, publish


def test_the_cache_copies_the_arrays_of_the_caller():
    cache = hybrid()
    rows, tokens = cache.allocate_kv(5), ids("hello")
    given = rows.copy()
    result = cache.insert(tokens, given)
    given[:], tokens[:] = 99, 99
    assert cache.gather(result.node).tolist() == rows.tolist()
    assert cache.match(ids("hello!")).kv_match_len == 5


def test_match_changes_nothing():
    cache = hybrid()
    publish(cache, ids("hello world"), [5, 11])
    before = cache.render()
    for prompt in ("hello", "help", "hello world", "hello w", "bye"):
        cache.match(ids(prompt))
    assert cache.render() == before
    assert cache.stats.total.requests == 0


def test_a_null_cache_stores_nothing():
    cache = hybrid(prefix_cache="none")
    result = publish(cache, ids("hello"), [5])
    assert result.inserted_len == 0 and len(result.rejected_slots) == 1
    assert cache.match(ids("hello!")).losses.never_seen == 6
    cache.check(held_tokens=0, held_slots=0)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"num_kv_tokens": 1000, "num_slots": 10}, (1, 100)),
        ({"num_kv_tokens": 4, "num_slots": 10}, (1, 1)),
        ({"num_kv_tokens": 4, "num_slots": 0}, (1, 4)),
        ({"num_kv_tokens": 1000, "num_slots": 10, "state_bytes": 7}, (1, 7)),
        ({"total_bytes": 1000, "kv_bytes_per_token": 2, "state_bytes": 9}, (2, 9)),
        ({"num_kv_tokens": 1000, "prefix_cache": "radix"}, (1, 0)),
    ],
)
def test_default_item_bytes_make_both_pools_weigh_the_same(options, weights):
    """Policies that compare bytes need the size of a state, also if none is configured."""
    assert CacheConfig(**options).item_bytes == weights
