"""A prefix that is brought into a cache: who holds what, and what may happen meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.export.arrival import Arrival
from hybridcache.policies.registry import EVICTION
from tests.cache.test_lease import begin, make_cache, prefill, tokens


def check(cache, *holders) -> None:
    cache.check(sum(one.held_tokens for one in holders), sum(one.held_slots for one in holders))


def test_what_arrives_is_hit_as_if_it_had_been_computed() -> None:
    cache, prompt = make_cache(), tokens(200)
    arrival = Arrival.begin(cache, prompt[:192], stateful=True)
    assert arrival is not None and (arrival.start, arrival.end) == (0, 192)
    assert len(arrival.rows) == 192 and arrival.slot is not None
    check(cache, arrival)
    assert cache.match(prompt).cached_len == 0
    rows, slot = arrival.rows.copy(), arrival.slot
    arrival.publish()
    check(cache)
    match = cache.match(prompt)
    assert (match.cached_len, match.checkpoint) == (192, slot)
    assert np.array_equal(cache.gather(match.node), rows)
    assert cache.stats.total.requests == 0


def test_only_what_is_missing_is_claimed_and_what_is_there_stays() -> None:
    """KV without a state counts: the state alone comes for it."""
    cache, prompt = make_cache(kv_tokens=512, slots=4), tokens(400)
    lease = begin(cache, prompt[:150], "none")
    prefill(lease, prompt[:150])
    lease.finish(prompt[:150], 150, donate=False)
    assert (cache.match(prompt).cached_len, cache.match(prompt).kv_match_len) == (0, 150)
    whole, half = (Arrival.begin(cache, prompt[:n], stateful=True) for n in (320, 128))
    assert whole is not None and half is not None
    assert (whole.start, len(whole.rows)) == (150, 170)
    assert (half.start, len(half.rows)) == (128, 0)
    cache.evict(num_tokens=512, num_slots=4)
    assert cache.match(prompt).kv_match_len == 150
    half.publish()
    whole.publish()
    check(cache)
    assert cache.match(prompt[:140]).cached_len == 128
    assert cache.match(prompt).cached_len == 320


def test_what_was_computed_meanwhile_is_kept_and_the_arrival_is_freed() -> None:
    cache, prompt = make_cache(), tokens(200)
    arrival = Arrival.begin(cache, prompt[:192], stateful=True)
    assert arrival is not None
    lease = begin(cache, prompt)
    [(_, slot)] = prefill(lease, prompt)
    check(cache, arrival, lease)
    arrival.publish()
    lease.finish(prompt, 200)
    check(cache)
    assert cache.match(prompt).checkpoint == slot and cache.cached_tokens == 200


def test_given_up_or_refused_it_leaves_nothing() -> None:
    cache, prompt = make_cache(kv_tokens=256, slots=2), tokens(512)
    arrival = Arrival.begin(cache, prompt[:192], stateful=True)
    assert arrival is not None
    for too_much in (prompt[256:448], prompt[128:192]):
        other = Arrival.begin(cache, too_much, stateful=True)
        assert (other is None) == (len(too_much) > 64)
        if other is not None:
            assert Arrival.begin(cache, prompt[300:364], stateful=True) is None  # no slot left
            other.abort()
    check(cache, arrival)
    arrival.abort()
    check(cache)
    assert (cache.free_tokens, cache.free_slots) == (256, 2)


@pytest.mark.parametrize("kind", ["hybrid", "radix"])
@pytest.mark.parametrize("eviction", sorted(EVICTION))
def test_an_arrival_that_is_given_up_changes_no_order_of_eviction(kind: str, eviction: str) -> None:
    """Three prompts, a part of the oldest is expected and given up: evicting goes on as before."""

    def survivors(aborted_len: int) -> list[list[int]]:
        stateful = kind == "hybrid"
        sizes = {"num_kv_tokens": 600, "num_slots": 8, "grid": 10}
        weights = {"kv_bytes_per_token": 1, "state_bytes": 20}
        cache = build_prefix_cache(
            CacheConfig(prefix_cache=kind, eviction=eviction, dead_first=False, **sizes, **weights)
        )
        prompts = [tokens(100, 1000 * number) for number in range(3)]
        for prompt in prompts:
            lease = begin(cache, prompt, "prompt", stateful=stateful)
            prefill(lease, prompt)
            lease.finish(prompt, 100)
        if aborted_len:
            arrival = Arrival.begin(cache, prompts[0][:aborted_len], stateful=stateful)
            assert arrival is not None
            arrival.abort()
        check(cache)
        found = []
        while cache.cached_tokens:
            cache.evict(num_tokens=1)
            found.append(
                [cache.match(np.append(p, 9).astype(np.int32)).kv_match_len for p in prompts]
            )
        return found

    untouched = survivors(0)
    assert len(untouched) == 3 and survivors(100) == untouched
    if kind == "hybrid":  # without states a part of an edge is an item of its own
        assert survivors(50) == untouched


@pytest.mark.parametrize("page_size", [1, 16])
def test_an_attention_only_cache_takes_no_slot(page_size: int) -> None:
    cache, prompt = make_cache("radix", slots=0, page_size=page_size), tokens(400)
    lease = begin(cache, prompt[:100], stateful=False)
    prefill(lease, prompt[:100])
    lease.finish(prompt[:100], 100)
    arrival = Arrival.begin(cache, prompt[:320], stateful=False)
    assert arrival is not None and arrival.slot is None
    assert arrival.start == 100 // page_size * page_size
    arrival.publish()
    check(cache)
    assert cache.match(prompt).cached_len == 320


def test_rows_that_move_are_renamed() -> None:
    """An arena empties the slab under an arrival for somebody's state."""
    cache = build_prefix_cache(
        CacheConfig(
            memory="arena", total_bytes=8 * 40, kv_bytes_per_token=1, state_bytes=40, grid=8
        )
    )
    contents = np.zeros(320, np.int64)
    first, second = (Arrival.begin(cache, tokens(64, n), stateful=True) for n in (0, 500))
    assert first is not None and second is not None
    for arrival in (first, second):
        contents[arrival.rows] = 1000 * arrival.end + np.arange(64) + id(arrival) % 997
    before = contents[second.rows].copy()
    first.abort()
    slots = []
    while (slot := cache.allocate_slot()) is not None:
        slots.append(slot)
    moves = cache.take_step().transfers
    assert moves, "nothing moved"
    for move in moves:
        contents[move.dst] = contents[move.src]
    assert np.array_equal(contents[second.rows], before)
    cache.check(second.held_tokens, second.held_slots + len(slots))
    second.abort()
    for slot in slots:
        cache.free_slot(slot)
    check(cache)
