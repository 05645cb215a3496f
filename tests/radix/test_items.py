"""Item attributes that policies see: size, position, span, uses and times."""

from __future__ import annotations

import random

import pytest

from hybridcache.radix.protocol import EvictionPolicy, Item, Kind
from tests.radix.serving import hybrid, ids, serve, traffic

TOKEN_BYTES, STATE_BYTES = 3, 1000


class NextVictim(EvictionPolicy):
    """Policy with a next victim that is set by the test."""

    def __init__(self) -> None:
        self.next: Item | None = None

    def add(self, item: Item) -> None: ...
    def discard(self, item: Item, evicted: bool) -> None: ...

    def victim(self, kind: Kind | None) -> Item | None:
        return self.next


def cache_of(prefix_cache, seed, num_requests):
    sizes = {"kv_bytes_per_token": TOKEN_BYTES, "state_bytes": STATE_BYTES, "grid": 4}
    cache = hybrid(10_000, 400, prefix_cache=prefix_cache, **sizes)
    rng = random.Random(seed)
    for tokens in traffic(seed, num_requests):
        whole = len(tokens) // 4 * 4
        positions = {whole, rng.randint(0, whole // 4) * 4} - {0} if rng.random() < 0.7 else set()
        serve(cache, tokens, sorted(positions) if prefix_cache == "hybrid" else ())
    return cache


def used_bytes(cache):
    return TOKEN_BYTES * cache.cached_tokens + STATE_BYTES * cache.num_checkpoints


@pytest.mark.full("0-hybrid", "1-radix")
@pytest.mark.parametrize("prefix_cache", ["hybrid", "radix"])
@pytest.mark.parametrize("seed", range(4))
def test_item_size_equals_the_bytes_that_eviction_frees(prefix_cache, seed):
    cache = cache_of(prefix_cache, seed, 80)
    rng = random.Random(seed)
    cache.policy = policy = NextVictim()
    handles = [cache.lock(node) for node in rng.sample(list(cache._tree.nodes()), 5)]
    while candidates := [item for item in cache.candidates() if not item.node.locks]:
        policy.next = rng.choice(candidates)
        expected, before = policy.next.size_bytes, used_bytes(cache)
        cache.evict_next()
        assert before - used_bytes(cache) == expected
    for handle in handles:
        cache.unlock(handle)
    cache.check(held_tokens=0, held_slots=0)


@pytest.mark.full("0")
@pytest.mark.parametrize("seed", range(4))
def test_position_span_and_above_match_the_path(seed):
    cache = cache_of("hybrid", seed, 80)
    cache.evict(num_slots=20)
    items = [
        item
        for node in cache._tree.nodes()
        for item in (node.kv, node.checkpoint)
        if item is not None
    ]
    assert {item.kind for item in items} == {"kv", "checkpoint"}
    for item in items:
        path, node = [], item.node
        while node.parent is not None:
            path.append(node)
            node = node.parent
        assert item.position == sum(len(part.tokens) for part in path)
        above = next((part.checkpoint for part in path[1:] if part.checkpoint), None)
        assert item.above is above
        assert item.span == item.position - (above.position if above else 0)
        own = path if item.kind == "kv" else path[1:]
        known = (part.checkpoint or part.lost_checkpoint for part in own)
        assert item.predecessor is next((one for one in known if one), None)
        if item.kind == "checkpoint" and item.node.children:
            assert item.size_bytes == STATE_BYTES
        dead = item.kind == "kv" and not item.node.children and item.node.checkpoint is None
        assert item.dead == dead


def test_a_shared_head_has_two_used_checkpoints_at_its_distance_or_behind():
    """Two texts follow a head of 8 tokens, with a checkpoint each after 4 more."""
    cache, head, found = hybrid(), ids(range(8)), []
    for number in (10, 11):
        for positions in ((8, 12), ()):
            serve(cache, ids(head, [number] * 5), positions)
        item = cache.match(ids(head, "x")).resumed
        found.append([item.is_shared_head(within) for within in (3, 4, 5)])
    assert item.position == 8 and found == [[False] * 3, [True, True, False]]


def test_span_without_states_is_the_length_of_the_segment():
    for node in cache_of("radix", 0, 80)._tree.nodes():
        if node.kv is not None:
            assert node.kv.span == len(node.kv.indices) == len(node.tokens)
            assert not node.kv.indices.flags.writeable
            assert not node.kv.dead
