"""Tiers below the device: what goes where, what comes back, and what is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.geometry.exchange import Exchange
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.registry import parse_placement
from hybridcache.tokens import Tokens
from hybridcache.variants import TieredRadixCache
from tests.cache.serving import carried_out, ids, serve
from tests.cache.tiers import TieredMemory


def churn(seed: int, num_requests: int, eviction: str = "lru") -> Counter[tuple[str, str, str]]:
    """Traffic over a device, a host and a disk of a few nodes each; what was copied how often."""
    rng = np.random.default_rng(seed)
    config = CacheConfig(
        total_bytes=int(rng.integers(40, 120)),
        memory=str(rng.choice(["arena", "budget"])),
        kv_bytes_per_token=2,
        state_bytes=int(rng.choice([3, 8, 20])),
        grid=int(rng.choice([1, 4])),
        eviction=eviction,
        host_bytes=int(rng.integers(40, 160)),
        disk_bytes=int(rng.integers(60, 240)),
        ghost_bytes=int(rng.choice([0, 5000, 1 << 20])),
    )
    memory = TieredMemory(config)
    step, seen = memory.cache._step, [np.empty(0, np.int32)]
    for _ in range(num_requests):
        before = seen[rng.integers(max(0, len(seen) - 12), len(seen))]
        kept = before[: rng.integers(len(before) + 1) if rng.random() < 0.4 else len(before)]
        tokens = np.concatenate([kept, rng.integers(0, 2, rng.integers(1, 8), np.int32)])[:24]
        seen.append(tokens)
        places = {len(tokens) // step * step, int(rng.integers(0, len(tokens))) // step * step}
        memory.serve(tokens, None, sorted(places - {0}), int(rng.integers(0, 3)))
        memory.check()
    return Counter((order.kind, order.src_tier, order.dst_tier) for order in memory.copied)


@pytest.mark.parametrize("eviction", ["lru", "survival"])
def test_a_stream_of_requests_keeps_every_byte_in_its_place(eviction: str):
    copied: Counter[tuple[str, str, str]] = Counter()
    for seed in range(4):
        copied += churn(seed, 40, eviction)
    ways = {("device", "host"), ("host", "disk"), ("host", "device"), ("disk", "device")}
    assert set(copied) >= {(kind, *way) for kind in ("kv", "checkpoint") for way in ways}


def tiered(**options: object) -> TieredRadixCache:
    """Ten tokens of KV and two states on the device, and twice that on the host."""
    sizes = {"num_kv_tokens": 20, "num_slots": 2, "host_bytes": 160}
    given = {"kv_bytes_per_token": 2, "state_bytes": 10, "grid": 1}
    cache = build_prefix_cache(CacheConfig(**(sizes | given | options)))
    assert isinstance(cache, TieredRadixCache)
    return cache


def lower(cache: TieredRadixCache, tokens: Tokens) -> list[tuple[int, tuple[int, ...]]]:
    return [(one.position, one.rows) for one in cache.match(tokens).loadable]


def test_without_lower_tiers_nothing_is_lower():
    config = CacheConfig(num_kv_tokens=20, num_slots=2, grid=1, state_bytes=10)
    cache = build_prefix_cache(config)
    serve(cache, ids("abcd"), [4])
    assert cache.offload is None and cache.match(ids("abcd")).loadable == ()


def test_what_leaves_the_device_lies_on_the_host_state_and_kv():
    cache = tiered()
    serve(cache, ids("abcd"), [4])
    cache.evict(num_tokens=4)
    assert lower(cache, ids("abcdX")) == [(4, (4 + 5,))]
    assert lower(cache, ids("abcX")) == []


def test_kv_that_no_state_needs_is_not_kept():
    cache = tiered()
    serve(cache, ids("abcd"), [2])
    cache.evict(num_tokens=1)
    assert [order.kind for order in carried_out(cache).transfers] == []
    assert cache.match(ids("abcd")).kv_match_len == 2
    cache.evict(num_tokens=1)
    assert [order.kind for order in carried_out(cache).transfers] == ["checkpoint", "kv"]


def test_a_tombstone_is_resumed_by_its_state_alone():
    cache = tiered(num_slots=1)
    serve(cache, ids("abcd"), [2])
    cache.evict(num_slots=1)
    assert lower(cache, ids("abX")) == [(2, (5,))]
    assert cache.fetch(cache.match(ids("abX")).loadable[0])
    assert cache.match(ids("abX")).cached_len == 2
    cache.check(held_tokens=0, held_slots=0)


def test_what_is_computed_anew_leaves_the_host():
    cache = tiered()
    serve(cache, ids("abcd"), [4])
    cache.evict(num_tokens=4)
    serve(cache, ids("abcd"), [4])
    assert cache.match(ids("abcdX")).cached_len == 4
    assert all(tier.pages.num_taken == 0 for tier in cache.offload.tiers)


def test_a_fetch_that_finds_no_room_changes_nothing():
    cache = tiered(num_slots=1)
    serve(cache, ids("abcd"), [4])
    cache.evict(num_tokens=4)
    slot = cache.allocate_slot()
    before = lower(cache, ids("abcdX"))
    assert not cache.fetch(cache.match(ids("abcdX")).loadable[0])
    assert slot is not None and lower(cache, ids("abcdX")) == before
    cache.check(held_tokens=0, held_slots=1)


@pytest.mark.parametrize("eviction", ["lru", "lfu", "lhd", "survival"])
def test_a_use_through_a_tier_is_one_use_as_on_the_device(eviction: str):
    cache = tiered(eviction=eviction)
    serve(cache, ids("abcd"), [4])
    for uses in range(1, 5):
        if uses % 2:
            cache.evict(num_tokens=4)
            cache.fetch(cache.match(ids("abcdX")).loadable[0])
        match = cache.match(ids("abcdX"))
        cache.touch(match)
        assert match.node.checkpoint.uses == uses


def test_a_state_that_finds_no_room_was_not_used():
    cache = tiered(num_slots=1)
    serve(cache, ids("abcd"), [4])
    cache.evict(num_tokens=4)
    cache.allocate_slot()
    match = cache.match(ids("abcdX"))
    assert not cache.fetch(match.loadable[0])
    assert match.loadable[0].node.offloaded.state.uses == 0


def test_making_room_for_a_fetch_spares_the_path_that_it_hangs_on():
    cache = tiered(num_kv_tokens=6, num_slots=2)
    serve(cache, ids("abcd"), [2, 4])
    cache.evict(num_tokens=2)
    serve(cache, ids("wxyz"), [4])
    assert (cache.free_tokens, cache.free_slots) == (0, 0)
    assert cache.fetch(cache.match(ids("abcdX")).loadable[0])
    assert cache.match(ids("abcdX")).cached_len == 4
    cache.check(held_tokens=0, held_slots=0)


def test_the_host_lets_its_own_policy_s_victim_go_and_the_disk_takes_it():
    cache = tiered(host_bytes=2 * 9, disk_bytes=200)
    for prompt in ("abcd", "efgh"):
        serve(cache, ids(prompt), [4])
    cache.evict(num_tokens=8)
    assert cache.match(ids("abcdX")).loadable[0].rows == (0, 9)
    assert cache.match(ids("efghX")).loadable[0].rows == (9, 0)
    written = [order for order in carried_out(cache).transfers if getattr(order, "path", None)]
    assert {order.kind for order in written} == {"kv", "checkpoint"}
    assert all(order.path[1].tolist() == ids("abcd").tolist() for order in written)


def test_what_the_host_would_let_go_first_is_not_let_in():
    """A superseded state goes first in every tier, the newcomer among them."""
    cache = tiered(num_slots=3, host_bytes=2 * 9)
    serve(cache, ids("wxyz"), [4])
    cache.evict(num_tokens=4)
    serve(cache, ids("abcd"), [2, 4])
    carried_out(cache)
    cache.evict(num_slots=1)
    assert not cache.steps.num_transfers
    assert lower(cache, ids("abX")) == [] and lower(cache, ids("wxyzX"))


class Rate:
    """A fetch rule of the test's own."""

    def __init__(self, seconds_a_byte: float) -> None:
        self.seconds_a_byte = seconds_a_byte

    def seconds_saved(self, cached_len, position, prompt_len, num_bytes):
        return position - cached_len - self.seconds_a_byte * sum(num_bytes.values())


@pytest.mark.parametrize(
    ("rate", "cached_len", "not_fetched"), [(0.01, 4, 0), (0.19, 4, 0), (1.0, 0, 4), (None, 0, 4)]
)
def test_a_lease_fetches_what_saves_time_and_says_what_it_left(
    rate: float | None, cached_len: int, not_fetched: int
):
    cache = tiered()
    serve(cache, ids("abcd"), [2, 4])
    cache.evict(num_tokens=4, num_slots=2)
    asked = LeaseRequest(ids("abcdX"))
    rule = None if rate is None else Rate(rate)
    lease = Lease.begin(cache, parse_placement("end"), asked, rule)
    assert lease is not None and lease.cached_len == cached_len
    assert lease.losses.not_fetched == not_fetched
    assert lease.cached_len + sum(lease.losses) == 5
    lease.abort()
    cache.check(held_tokens=0, held_slots=0)


def without_a_free_slot(num_slots: int = 2) -> TieredRadixCache:
    """One checkpoint on the device at 2, a deeper one on the host at 4; other slots are held."""
    cache = tiered(num_slots=num_slots, demote_superseded=False, eviction="lru")
    serve(cache, ids("abcd"), [2, 4])
    cache.touch(cache.match(ids("abX")))
    cache.evict(num_slots=1)
    while cache.free_slots:
        cache.allocate_slot()
    match = cache.match(ids("abcdX"))
    assert match.cached_len == 2 and [one.position for one in match.loadable] == [4]
    return cache


@pytest.mark.parametrize("rate", [0.01, 1.0, None])
def test_a_refusal_and_a_load_that_failed_are_counted_once_each(rate: float | None):
    """The request takes the slot of the checkpoint that it found, so nothing can be loaded into
    it: two tokens were refused, two not fetched."""
    cache = without_a_free_slot()
    rule = None if rate is None else Rate(rate)
    lease = Lease.begin(cache, parse_placement("end"), LeaseRequest(ids("abcdX")), rule)
    assert lease is not None and lease.cached_len == 0
    assert (lease.losses.refused, lease.losses.not_fetched) == (2, 2)
    assert sum(lease.losses) == 5
    lease.abort()
    cache.check(held_tokens=0, held_slots=1)


def test_a_request_that_reuses_nothing_was_not_short_of_a_load():
    """Its causes are those of the match: tokens that the host has are no failed load."""
    cache = tiered(host_bytes=400)
    serve(cache, ids("abcdefgh"), [8])
    cache.evict(num_slots=1)
    found = cache.match(ids("abcdefghX"))
    assert [at.position for at in found.loadable] == [8]
    asked = LeaseRequest(ids("abcdefghX"), reuse=False)
    lease = Lease.begin(cache, parse_placement("none"), asked)
    assert lease.match.loadable == () and lease.losses == found.losses
    lease.abort()


def test_the_checkpoint_that_made_room_can_be_loaded_again():
    """It went to the host when the request took its slot, and is offered with what else lies
    there."""
    cache = without_a_free_slot(num_slots=3)
    cache.free_slot(2)
    serve(cache, ids("xy"), [2])
    receipt = cache.lock(cache.match(ids("xyX")).node)
    offered: list[tuple[int, int]] = []

    class Noting(Rate):
        def seconds_saved(self, cached_len, position, prompt_len, num_bytes):
            offered.append((cached_len, position))
            return 0.0

    lease = Lease.begin(cache, parse_placement("end"), LeaseRequest(ids("abcdX")), Noting(0))
    assert lease is not None and lease.cached_len == 0
    assert offered == [(0, 2), (0, 4)]
    assert (lease.losses.refused, lease.losses.not_fetched, sum(lease.losses)) == (2, 2, 5)
    lease.abort()
    cache.unlock(receipt)


class Linear:
    """A second for four tokens."""

    def seconds(self, start: int, end: int) -> float:
        return (end - start) / 4


def test_one_exchange_rate_seconds_of_copy_against_seconds_of_prefill():
    exchange = Exchange(Linear(), {"host": 100.0, "disk": 10.0}, {"disk": 0.5})
    assert exchange.seconds_saved(0, 8, 12, {"host": 100, "disk": 0}) == 1.0
    assert exchange.seconds_saved(4, 8, 12, {"host": 100, "disk": 0}) == 0.0
    assert exchange.seconds_saved(0, 8, 12, {"host": 0, "disk": 20}) == -0.5
    with pytest.raises(ValueError, match="must be more than 0"):
        Exchange(Linear(), {"host": 0.0})
    with pytest.raises(TypeError, match=r"must have a method seconds\(start, end\)"):
        Exchange(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bytes_per_s must have an entry for disk"):
        Exchange(Linear(), {"host": 1.0}).copy_seconds({"host": 3, "disk": 4, "far": 0})


def test_what_an_earlier_process_left_is_adopted_and_fetched():
    memory = TieredMemory(
        CacheConfig(
            num_kv_tokens=20,
            num_slots=2,
            grid=2,
            kv_bytes_per_token=2,
            state_bytes=10,
            disk_bytes=100,
        )
    )
    memory.adopt(ids("abcd"), None, "disk")
    memory.adopt(ids("abcdef"), None, "disk")
    memory.adopt(ids("abxy"), None, "disk")
    memory.check()
    assert lower(memory.cache, ids("abcdefX")) == [(4, (9,)), (6, (11,))]
    assert lower(memory.cache, ids("abxyX")) == [(4, (9,))]
    memory.serve(ids("abcdefX"), None, [], 1)
    memory.check()
    assert memory.cache.match(ids("abcdefX")).cached_len == 6
    assert memory.cache.adopt(ids("abcd"), None, "disk") is None
    with pytest.raises(ValueError, match=r"tier must be one of .* \(got 'host'\)"):
        memory.cache.adopt(ids("ab"), None, "host")
    with pytest.raises(ValueError, match="multiple of 2"):
        memory.cache.adopt(ids("abc"), None, "disk")


def test_a_fetch_that_finds_no_room_leaves_kv_where_something_needs_it():
    """Making room for a state on disk drives a deeper one from the host. When the fetch fails for
    want of rows, the KV above goes down after it instead of staying on the host for nothing."""
    cache = tiered(host_bytes=2 * 13, disk_bytes=400, eviction="lru")
    serve(cache, ids("abcdefgh"), [4, 8])
    cache.evict(num_tokens=8, num_slots=2)
    near, far = cache.match(ids("abcdefghX")).loadable
    assert (near.rows, far.rows) == ((4, 5), (13, 0)), "the shallow state is on disk"
    serve(cache, ids("xy"), [2])
    held = cache.allocate_kv(17)
    assert held is not None and cache.allocate_slot() is not None
    assert not cache.fetch(near)
    cache.check(held_tokens=17, held_slots=1)
    near, far = cache.match(ids("abcdefghX")).loadable
    assert (near.rows, far.rows) == ((0, 9), (0, 13)), "all of the path is on disk now"


def test_what_hangs_on_a_node_that_came_back_to_the_device_is_adopted():
    """The node's KV was on disk before; a part of it below is there still."""
    cache = tiered(host_bytes=2 * 9, disk_bytes=400)
    serve(cache, ids("abcd"), [2, 4])
    cache.evict(num_tokens=4)
    for other in ("efgh", "ijkl"):
        serve(cache, ids(other), [4])
    cache.evict(num_tokens=8)
    near, _ = cache.match(ids("abcdX")).loadable
    assert near.rows[0] == 0 < near.rows[1], "on disk"
    assert cache.fetch(near) and cache.match(ids("abcdX")).cached_len == 2
    assert cache.fetch(cache.match(ids("ijklX")).loadable[0]), "the host is empty now"
    taken = cache.adopt(ids("abxy"), None, "host")
    assert taken is not None and taken[0] == 2


def test_a_state_is_adopted_on_kv_that_was_on_disk_before_it_was_fetched():
    """KV on the device refuses nothing in the host tier, wherever it was before."""
    memory = TieredMemory(
        CacheConfig(
            num_kv_tokens=20,
            num_slots=2,
            grid=2,
            kv_bytes_per_token=2,
            state_bytes=10,
            host_bytes=100,
            disk_bytes=100,
        )
    )
    memory.adopt(ids("ab"), None, "disk")
    memory.adopt(ids("abcd"), None, "disk")
    memory.serve(ids("abX"), None, [], 0)
    assert memory.cache.match(ids("abX")).cached_len == 2, "and 'abcd' is on disk still"
    memory.adopt(ids("abxy"), None, "host")
    memory.check()
    assert lower(memory.cache, ids("abxyX")) == [(4, (7, 0))]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"host_bytes": 5}, "host_bytes must hold at least one state"),
        ({"prefix_cache": "radix"}, "host_bytes needs a hybrid cache"),
        (
            {"kv_bytes_per_token": 1, "state_bytes": 1},
            "kv_bytes_per_token and state_bytes must be given",
        ),
    ],
)
def test_tiers_that_can_not_be_are_refused(options: dict[str, object], why: str):
    with pytest.raises(ValueError, match=why):
        tiered(**options)


def test_a_state_is_superseded_below_only_as_long_as_something_supersedes_it():
    """A deeper state that went for good supersedes nothing: what lies above it is worth its own."""
    cache = tiered(num_slots=4, num_kv_tokens=40, host_bytes=2 * (4 + 5 + 5))
    serve(cache, ids("abcd"), [2, 4])
    cache.evict(num_tokens=4, num_slots=2)
    (shallow, deep) = (one.node.offloaded.state for one in cache.match(ids("abcdX")).loadable)
    assert (shallow.superseded, deep.superseded) == (True, False)
    cache.offload.drop_state(deep.node)
    assert cache.offload._victim(0) is shallow and not shallow.superseded
    fork = tiered(num_slots=4, num_kv_tokens=40, host_bytes=200)
    serve(fork, ids("abcd"), [2, 4])
    serve(fork, ids("abxy"), [4])
    fork.evict(num_tokens=6, num_slots=3)
    assert not fork.match(ids("abX")).loadable[0].node.offloaded.state.superseded
