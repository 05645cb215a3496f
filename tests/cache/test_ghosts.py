"""Ghosts: tokens of evicted KV that the cache remembers."""

from __future__ import annotations

import pytest

from tests.cache.serving import (
    hybrid,
    ids,
    publish,
    serve,
)


def test_a_ghost_gives_no_hit_but_a_seen_len():
    cache = hybrid()
    serve(cache, ids("hello world"), [5, 11])
    cache.evict(num_tokens=100)
    match = cache.match(ids("hello wonder"))
    assert (match.cached_len, match.kv_match_len, match.seen_len) == (0, 0, 8)
    assert match.losses.kv_evicted == 8 and match.losses.never_seen == 4
    assert cache.ghost_tokens == 11


def test_a_ghost_identifies_the_missed_checkpoint():
    cache = hybrid()
    serve(cache, ids("hello world"), [5, 11])
    cache.evict(num_tokens=100)
    assert cache.match(ids("hello wonder")).missed.position == 5
    assert cache.match(ids("hello world!")).missed.position == 11
    assert cache.match(ids("hell")).missed is None
    cache.touch(cache.match(ids("hello world!")))
    usage = cache.stats.by_namespace[None]
    assert (usage.missed, usage.missed_tokens) == (1, 11)


def test_the_deepest_evicted_checkpoint_counts_as_missed():
    cache = hybrid()
    serve(cache, ids("abcdefgh"), [2, 4, 8])
    serve(cache, ids("abcdX"), [5])
    cache.touch(cache.match(ids("abcdX!")))
    cache.touch(cache.match(ids("abZ")))
    locks = [cache.lock(cache.match(ids(prompt)).node) for prompt in ("abcdX!", "abZ")]
    cache.evict(num_slots=10)
    match = cache.match(ids("abcdefgh!"))
    assert (match.cached_len, match.kv_match_len, match.seen_len) == (2, 4, 8)
    assert match.losses.checkpoint_evicted == 2, "the tombstone at 4 ends the loss"
    assert match.missed.position == 8
    assert len(locks) == 2


def test_the_policy_gets_one_ghost_hit_per_request():
    cache, ghost_hits = hybrid(), []
    cache.policy.on_ghost_hit = ghost_hits.append
    serve(cache, ids("hello"), [4])
    cache.touch(cache.match(ids("hello")))
    assert ghost_hits == []
    cache.evict(num_tokens=10)
    match = cache.match(ids("hello"))
    assert ghost_hits == []
    cache.touch(match)
    assert ghost_hits == [match.missed] and match.missed.position == 4


def test_a_ghost_becomes_resident_when_its_tokens_are_inserted():
    cache = hybrid()
    serve(cache, ids("hello world"), [11])
    cache.evict(num_tokens=100)
    serve(cache, ids("hello wonder"), [12])
    assert cache.ghost_tokens == 3
    assert cache.match(ids("hello wonder!")).cached_len == 12
    assert cache.match(ids("hello world")).seen_len == 11
    cache.check(held_tokens=0, held_slots=0)


def test_the_oldest_ghosts_are_dropped_first():
    cache = hybrid(ghost_bytes=2 * (640 + 4 * 5))
    for prompt in ("first", "other", "third"):
        serve(cache, ids(prompt), [5])
        cache.evict(num_tokens=5)
    assert cache.match(ids("first")).seen_len == 0
    assert cache.match(ids("other")).seen_len == 5
    assert cache.match(ids("third")).seen_len == 5
    cache.check(held_tokens=0, held_slots=0)


@pytest.mark.parametrize("ghost_bytes", [0, 1000])
def test_ghosts_never_exceed_their_byte_limit(ghost_bytes):
    cache = hybrid(ghost_bytes=ghost_bytes)
    for number in range(100):
        serve(cache, ids([number], "x" * number), [number + 1])
        assert cache.ghosts.num_bytes <= ghost_bytes


def test_a_match_reports_whether_other_prompts_fork_at_its_end():
    cache = hybrid(num_kv_tokens=64, ghost_bytes=1 << 20)
    publish(cache, ids(range(20)), [10])

    def forks(length):
        return cache.match(ids(range(length), [99] * 3)).forks

    assert forks(5) and forks(10), "no fork inside an edge or where a checkpoint split it"
    assert not forks(20), "a fork at the end of all seen tokens"
    cache.evict(num_tokens=64)
    assert cache.match(ids(range(20))).kv_match_len == 0
    assert forks(5) and forks(10) and not forks(20), "forks of ghosts differ"
