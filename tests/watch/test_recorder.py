"""Records: whoever hears all of them, or begins with the whole, knows the tree."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from hybridcache.watch import recorder
from hybridcache.watch.recorder import Recorder
from tests.cache.serving import hybrid, ids, serve, traffic
from tests.watch.follower import follow, truth


@pytest.mark.full("1")
@pytest.mark.parametrize("scale", [1, 64])
def test_records_tell_the_tree(scale: int) -> None:
    cache = hybrid(num_kv_tokens=500)
    told = Recorder(scale)
    cache.subscribe(told)
    nodes: dict[int, dict[str, Any]] = {}
    for number, tokens in enumerate(traffic(3, 160)):
        namespace = (None, "tenant", ("a", 1))[number % 3]
        n = len(tokens)
        serve(cache, tokens, sorted({n, n // 2} - {0}), namespace=namespace)
        if number % 20 == 19:
            follow(nodes, told.take())
            assert nodes == truth(cache, scale)
    assert cache.stats.evicted_tokens and cache.stats.evicted_slots
    assert told.nodes.keys() == nodes.keys() and not len(told)
    late = Recorder(scale)
    cache.subscribe(late)
    whole: dict[int, dict[str, Any]] = {}
    follow(whole, late.take())
    assert whole == nodes
    cache.reset()
    follow(nodes, told.take())
    assert nodes == {} == truth(cache)


def test_a_key_tells_siblings_apart_and_stays_through_splits() -> None:
    """By it the page knows that a ghost's tokens came again."""
    cache = hybrid(num_kv_tokens=500)
    told = Recorder()
    cache.subscribe(told)
    first, second = [1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9]
    for tokens in (first, second):
        serve(cache, ids(tokens), [len(tokens)])
    stored = [record for record in told.take() if record[0] in ("kv", "split")]
    keys = {record[1]: record[-1] if record[0] == "split" else record[6] for record in stored}
    cache.evict(num_tokens=3)
    assert [record[0] for record in told.take()][-1] == "kv-gone"
    serve(cache, ids(first), [len(first)])
    again = [record for record in told.take() if record[0] == "kv"]
    assert all(record[6] in keys.values() for record in again) and again
    assert len(set(keys.values())) == len(keys)


def test_examples() -> None:
    assert doctest.testmod(recorder).failed == 0
