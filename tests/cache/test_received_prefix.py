"""ReceivedPrefix of a prefix from another engine: held rows, publication, abort and moves."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.registry import EVICTION
from hybridcache.scheduling.received_prefix import ReceivedPrefix
from tests.cache.test_lease import begin, make_cache, prefill, tokens


def check(cache, *holders) -> None:
    cache.check(sum(h.held_tokens for h in holders), sum(h.held_slots for h in holders))


def test_a_published_arrival_is_hit_like_a_computed_prefix() -> None:
    cache, prompt = make_cache(), tokens(200)
    arrival = ReceivedPrefix.begin(cache, prompt[:192], stateful=True)
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


def test_an_arrival_reserves_only_missing_rows_and_locks_the_rest() -> None:
    """KV without a state counts as present; then only the state is transferred."""
    cache, prompt = make_cache(kv_tokens=512, slots=4), tokens(400)
    lease = begin(cache, prompt[:150], "none")
    prefill(lease, prompt[:150])
    lease.finish(prompt[:150], 150, donate=False)
    assert (cache.match(prompt).cached_len, cache.match(prompt).kv_match_len) == (0, 150)
    whole, half = (ReceivedPrefix.begin(cache, prompt[:n], stateful=True) for n in (320, 128))
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


def test_a_prefix_computed_during_an_arrival_is_kept() -> None:
    cache, prompt = make_cache(), tokens(200)
    arrival = ReceivedPrefix.begin(cache, prompt[:192], stateful=True)
    assert arrival is not None
    lease = begin(cache, prompt)
    [(_, slot)] = prefill(lease, prompt)
    check(cache, arrival, lease)
    arrival.publish()
    lease.finish(prompt, 200)
    check(cache)
    assert cache.match(prompt).checkpoint == slot and cache.cached_tokens == 200


def test_an_aborted_or_refused_arrival_frees_everything() -> None:
    cache, prompt = make_cache(kv_tokens=256, slots=2), tokens(512)
    arrival = ReceivedPrefix.begin(cache, prompt[:192], stateful=True)
    assert arrival is not None
    for too_much in (prompt[256:448], prompt[128:192]):
        other = ReceivedPrefix.begin(cache, too_much, stateful=True)
        assert (other is None) == (len(too_much) > 64)
        if other is not None:
            no_slot_left = ReceivedPrefix.begin(cache, prompt[300:364], stateful=True)
            assert no_slot_left is None
            other.abort()
    check(cache, arrival)
    arrival.abort()
    check(cache)
    assert (cache.free_tokens, cache.free_slots) == (256, 2)


@pytest.mark.parametrize("kind", ["hybrid", "radix"])
@pytest.mark.parametrize("eviction", sorted(EVICTION))
def test_an_aborted_arrival_does_not_change_the_eviction_order(kind: str, eviction: str) -> None:
    def survivors(aborted_len: int) -> list[list[int]]:
        stateful = kind == "hybrid"
        sizes = {"num_kv_tokens": 600, "num_slots": 8, "grid": 10}
        weights = {"kv_bytes_per_token": 1, "state_bytes": 20}
        cache = build_prefix_cache(
            CacheConfig(prefix_cache=kind, eviction=eviction, dead_first=False, **sizes, **weights)
        )
        prompts = [tokens(100, 1000 * number) for number in range(3)]
        for prompt in prompts:
            lease = begin(cache, prompt, "every:100", stateful=stateful)
            prefill(lease, prompt)
            lease.finish(prompt, 100)
        if aborted_len:
            arrival = ReceivedPrefix.begin(cache, prompts[0][:aborted_len], stateful=stateful)
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
    if kind == "hybrid":  # without states, a part of an edge is a separate item
        assert survivors(50) == untouched


@pytest.mark.parametrize("page_size", [1, 16])
def test_an_attention_only_cache_takes_no_slot(page_size: int) -> None:
    cache, prompt = make_cache("radix", slots=0, page_size=page_size), tokens(400)
    lease = begin(cache, prompt[:100], stateful=False)
    prefill(lease, prompt[:100])
    lease.finish(prompt[:100], 100)
    arrival = ReceivedPrefix.begin(cache, prompt[:320], stateful=False)
    assert arrival is not None and arrival.slot is None
    assert arrival.start == 100 // page_size * page_size
    arrival.publish()
    check(cache)
    assert cache.match(prompt).cached_len == 320


def test_rows_of_an_arrival_follow_moves() -> None:
    """An arena empties the slab that holds an arrival's rows to make room for a state."""
    cache = build_prefix_cache(
        CacheConfig(
            memory="arena", total_bytes=8 * 40, kv_bytes_per_token=1, state_bytes=40, grid=8
        )
    )
    contents = np.zeros(320, np.int64)
    first, second = (ReceivedPrefix.begin(cache, tokens(64, n), stateful=True) for n in (0, 500))
    assert first is not None and second is not None
    for arrival in (first, second):
        contents[arrival.rows] = 1000 * arrival.end + np.arange(64) + id(arrival) % 997
    before = contents[second.rows].copy()
    first.abort()
    slots = []
    while (slot := cache.allocate_slot()) is not None:
        slots.append(slot)
    plan = cache.take_step()
    plan.done()
    moves = plan.transfers
    assert moves, "no row moved"
    for move in moves:
        contents[move.dst] = contents[move.src]
    assert np.array_equal(contents[second.rows], before)
    cache.check(second.held_tokens, second.held_slots + len(slots))
    second.abort()
    for slot in slots:
        cache.free_slot(slot)
    check(cache)
