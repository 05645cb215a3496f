"""Tiers: offloading, loading, adoption, victims, and refused configurations."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.policies.eviction.fifo import FIFO
from hybridcache.policies.registry import EvictionSpec, parse_placement
from hybridcache.radix.api import Listener, Losses
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.offload import LATENCY_S, Exchange
from hybridcache.radix.protocol import Item, PolicyError
from hybridcache.radix.tiers import TieredRadixCache
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import OffloadedCheckpoint, RadixNode
from tests.radix.serving import PerToken, Rate, carried_out, ids, serve
from tests.radix.tiers import TieredMemory
from tests.refused import refused


def tiered(**options: object) -> TieredRadixCache:
    """Build a cache with 20 tokens of KV and two states on the device, and 160 bytes on the
    host."""
    sizes = {"num_kv_tokens": 20, "num_slots": 2, "host_bytes": 160}
    item_sizes = {"kv_bytes_per_token": 2, "state_bytes": 10, "grid": 1}
    cache = build_prefix_cache(CacheConfig(**(sizes | item_sizes | options)))
    assert isinstance(cache, TieredRadixCache)
    return cache


def loadable(cache: TieredRadixCache, tokens: Tokens) -> list[tuple[int, tuple[int, ...]]]:
    """Return position and rows of each loadable prefix of ``tokens``."""
    row_bytes, loadable = cache.offload.row_bytes, cache.match(tokens).loadable
    return [
        (one.position, tuple(size // row_bytes for size in one.num_bytes.values()))
        for one in loadable
    ]


class Recorder(FIFO):
    """Policy that records the states that it is notified of, on the host only."""

    calls: ClassVar[list[tuple[str | bool, int]]] = []

    def add(self, item: Item) -> None:
        super().add(item)
        self.record("add", item)

    def discard(self, item: Item, evicted: bool) -> None:
        super().discard(item, evicted)
        self.record(evicted, item)

    def on_ghost_hit(self, item: Item) -> None:
        self.record("ghost hit", item)

    def record(self, what: str | bool, item: Item) -> None:
        if isinstance(item, OffloadedCheckpoint):
            self.calls.append((what, item.position))


def test_a_state_replaces_the_next_victim_of_a_full_tier_unless_it_is_the_victim():
    """Superseded states are evicted first in every tier, also if they are new there."""
    cache = tiered(num_slots=3, host_bytes=2 * 9, eviction=Recorder)
    Recorder.calls.clear()
    serve(cache, ids("wxyz"), [4])
    serve(cache, ids("abc"), [3])
    cache.evict(num_tokens=7)
    assert loadable(cache, ids("abcX")) and not loadable(cache, ids("wxyzX"))
    serve(cache, ids("mnopq"), [2, 5])
    carried_out(cache)
    cache.evict(num_slots=1)
    assert not cache.steps.transfers
    assert loadable(cache, ids("mnX")) == [] and loadable(cache, ids("abcX"))
    assert Recorder.calls == [("add", 4), ("add", 3), (True, 4), ("add", 2), (True, 2)]
    Recorder.calls.clear()
    for missed in ("wxyzX", "abcX", "mnX"):
        cache.touch(cache.match(ids(missed)))
    assert set(Recorder.calls) == {("ghost hit", 4)}


class Sizes(FIFO):
    """Policy that records the sizes of the states that it gets, on the host only."""

    found: ClassVar[list[int]] = []

    def add(self, item: Item) -> None:
        super().add(item)
        if isinstance(item, OffloadedCheckpoint):
            self.found.append(item.size_bytes)


def test_the_size_of_a_state_includes_kv_that_is_about_to_follow_it():
    cache = tiered(eviction=Sizes)
    Sizes.found.clear()
    serve(cache, ids("wxyz"), [4])
    cache.evict(num_tokens=4)
    [stored] = cache.offload.tiers[0].policy.candidates()
    assert Sizes.found == [stored.size_bytes] == [10 + 4 * 2]


def test_kv_replaces_the_next_victim_of_a_full_tier():
    cache = tiered(host_bytes=2 * 15, eviction="lru")
    serve(cache, ids("wxyz"), [4])
    cache.evict(num_tokens=4)
    serve(cache, ids("abc"), [3])
    cache.evict(num_tokens=3)  # The state fits. Its KV does not.
    assert loadable(cache, ids("abcX")) == [(3, (8,))] and not loadable(cache, ids("wxyzX"))


def test_nothing_is_offloaded_to_a_closed_tier():
    cache = tiered(disk_bytes=160)
    cache.offload.closed.add(0)
    serve(cache, ids("abcd"), [4])
    cache.evict(num_tokens=4)
    assert loadable(cache, ids("abcdX")) == [(4, (0, 9))] and not loadable(cache, ids("abcd"))


class Loads(Listener):
    """Listener that records whether the stored KV is being loaded."""

    def __init__(self, cache: TieredRadixCache) -> None:
        self.cache, self.seen = cache, []

    def kv_stored(self, node: RadixNode) -> None:
        self.seen.append(self.cache.is_loading)


def test_a_load_does_not_evict_the_prefix_that_it_continues():
    cache = tiered(num_slots=3, eviction=Recorder)
    cache.subscribe(loads := Loads(cache))
    serve(cache, ids(range(16)), [4, 9, 15])
    cache.evict(num_tokens=12)
    _, found = cache.match(ids(range(17))).loadable
    state, held = found.node.offloaded.state, cache.allocate_kv(6)
    Recorder.calls.clear()
    assert not cache.load(found) and (state.last_used, state.uses) == (cache.now + 1, 0)
    assert cache.match(ids(range(17))).cached_len == 4
    cache.free_kv(held)
    assert cache.load(found) and cache.match(ids(range(17))).cached_len == 15
    assert Recorder.calls == [(False, 15), ("add", 15), (False, 15)]
    assert cache.stats.inserted_tokens == 16 + 11
    assert loads.seen == [False] * 4 + [True] * 2
    cache.check(held_tokens=0, held_slots=0)


@pytest.mark.parametrize(
    ("rate", "cached_len", "not_fetched"), [(0.01, 4, 0), (0.04, 4, 0), (1.0, 0, 4), (None, 0, 4)]
)
def test_a_lease_fetches_if_it_saves_time_and_counts_the_rest(
    rate: float | None, cached_len: int, not_fetched: int
):
    cache = tiered()
    serve(cache, ids("abcde"), [2, 4], "tenant")
    cache.evict(num_tokens=5, num_slots=2)
    request = LeaseRequest(ids("abcdeX"), "tenant")
    rule = None if rate is None else Rate(rate)
    lease = Lease.begin(cache, parse_placement("end"), request, rule)
    assert lease is not None and lease.cached_len == cached_len
    assert lease.losses == Losses(1, 0, 0, 1, 0, not_fetched=not_fetched)
    lease.abort()
    cache.check(held_tokens=0, held_slots=0)


@pytest.mark.parametrize("rate", [0.01, 1.0, None])
def test_refused_and_not_fetched_tokens_are_counted_separately(rate: float | None):
    """The request takes the slot of the checkpoint that it found, so no slot is left for a load:
    two tokens are refused, two not fetched."""
    cache = tiered(priority_classes=False, eviction="lru")
    serve(cache, ids("abcd"), [2, 4])
    cache.touch(cache.match(ids("abX")))
    cache.evict(num_slots=1)
    cache.allocate_slot()
    match = cache.match(ids("abcdX"))
    assert match.cached_len == 2 and [found.position for found in match.loadable] == [4]
    rule = None if rate is None else Rate(rate)
    lease = Lease.begin(cache, parse_placement("end"), LeaseRequest(ids("abcdX")), rule)
    assert lease is not None and lease.cached_len == 0
    assert (lease.losses.refused, lease.losses.not_fetched) == (2, 2)
    assert sum(lease.losses) == 5
    lease.abort()
    cache.check(held_tokens=0, held_slots=1)


def test_exchange_subtracts_copy_time_from_saved_prefill_time():
    exchange = Exchange(PerToken(), {"host": 100.0, "disk": 10.0})
    for start, num_bytes, seconds in (
        (0, {"host": 100, "disk": 0}, 1.0 - LATENCY_S["host"]),
        (4, {"host": 100, "disk": 0}, -LATENCY_S["host"]),
        (0, {"host": 0, "disk": 20}, -LATENCY_S["disk"]),
    ):
        assert exchange.seconds_saved(start, 8, 12, num_bytes) == pytest.approx(seconds)


def test_a_state_can_be_adopted_on_kv_that_was_loaded_from_disk():
    """KV on the device must not prevent adoption into the host tier, wherever it was before."""
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
    assert memory.cache.adopt(ids("abcd"), None, "host") is None, "its prefix is on disk"
    memory.adopt(ids("abcd"), None, "disk")
    assert loadable(memory.cache, ids("abcdX")) == [(2, (0, 7)), (4, (0, 9))]
    memory.serve(ids("abX"), None, [], 0)
    assert memory.cache.match(ids("abX")).cached_len == 2  # 'abcd' is still on disk
    memory.adopt(ids("abxy"), None, "host")
    memory.check()
    assert loadable(memory.cache, ids("abxyX")) == [(4, (7, 0))]
    memory.serve(ids("klmnop"), None, [6], 0)
    memory.adopt(ids("klmn"), None, "disk")  # ends inside an edge
    memory.check()
    assert loadable(memory.cache, ids("klmnX")) == [(4, (0, 5))]


def test_an_offloaded_state_is_superseded_only_while_a_deeper_one_exists():
    """Dropping the deeper state ends the demotion of the shallower one; so does a fork."""
    sizes = {"num_slots": 4, "num_kv_tokens": 40, "host_bytes": 2 * (3 + 5 + 4 + 5 + 5)}
    cache = tiered(**sizes, eviction=Recorder)
    serve(cache, ids("xyz"), [3])
    cache.evict(num_tokens=3)
    older = cache.match(ids("xyzX")).loadable[0].node.offloaded.state
    serve(cache, ids("abcd"), [2, 4])
    cache.evict(num_slots=1)
    assert cache.match(ids("abX")).loadable[0].node.offloaded.state.superseded
    cache.evict(num_tokens=4, num_slots=1)
    (shallow, deep) = (found.node.offloaded.state for found in cache.match(ids("abcdX")).loadable)
    assert (shallow.superseded, deep.superseded) == (True, False)
    cache.offload.drop_state(deep.node)
    Recorder.calls.clear()
    assert cache.offload._victim(0) is older and not shallow.superseded
    assert Recorder.calls == [(False, 2), ("add", 2)]
    ended = tiered(num_slots=4, num_kv_tokens=40, host_bytes=200)
    serve(ended, ids("abcd"), [4])
    ended.label_tip(ended.match(ids("abcdX")).node, "session_end")
    ended.evict(num_tokens=4, num_slots=1)
    assert ended.match(ids("abcdX")).loadable[0].node.offloaded.state.superseded
    fork = tiered(num_slots=4, num_kv_tokens=40, host_bytes=200)
    serve(fork, ids("abcd"), [2, 4])
    serve(fork, ids("abxy"), [4])
    fork.evict(num_tokens=6, num_slots=3)
    assert not fork.match(ids("abX")).loadable[0].node.offloaded.state.superseded


OWN = type("Own", (FIFO,), {})  # a user's policy


@pytest.mark.parametrize("eviction", ("fifo", "lru", "gdsf", "survival", OWN))
def test_a_lost_state_can_be_adopted_again(eviction: EvictionSpec) -> None:
    """The heap of a policy then has two entries with equal values and serials."""
    sizes = {"num_kv_tokens": 40, "num_slots": 3, "state_bytes": 20, "host_bytes": 960}
    cache = tiered(**sizes, grid=4, eviction=eviction, ghost_bytes=20_000)
    assert cache.offload, "tiers without ghosts are true"
    tokens = np.arange(8, dtype=np.int32)
    serve(cache, tokens, (8,))
    cache.evict(100, 100)
    carried_out(cache)
    for _ in range(3):
        cache.offload.drop_lost("host", lambda rows: True)
        assert cache.adopt(tokens, None, "host") is not None
        cache.check(0, 0)
    cache.match(tokens)  # raises the failure of a policy
    cache.reset()
    cache.check(0, 0)


def test_a_state_is_dropped_if_kv_above_it_is_lost() -> None:
    cache = tiered(host_bytes=200)
    serve(cache, ids("abcdef"), [2, 5])
    cache.evict(num_tokens=6)
    first, _ = cache.match(ids("abcdef")).loadable
    cache.offload.drop_lost("host", lambda rows: rows is first.node.offloaded.kv)
    assert not cache.match(ids("abcdef")).loadable
    cache.check(held_tokens=0, held_slots=0)


def test_a_load_ends_if_making_room_for_it_drops_its_state() -> None:
    cache = tiered(num_slots=1, host_bytes=2 * 7, disk_bytes=2 * 7, eviction="lru")
    cache.adopt(ids("ab"), None, "host")
    cache.adopt(ids("abcd"), None, "disk")
    serve(cache, ids("wx"), [2])
    _, found = cache.match(ids("abcdX")).loadable
    assert not cache.load(found) and loadable(cache, ids("wxX")) == [(2, (7, 0))]
    cache.check(held_tokens=0, held_slots=0)


def test_an_adopted_prefix_can_fill_its_tier() -> None:
    cache = tiered(host_bytes=2 * 9)
    with pytest.raises(ValueError, match=r"^tokens must be"):
        cache.adopt([1, 2], None, "host")  # type: ignore[arg-type]
    refused(r"^no tier 'disk'; this cache has: host$", cache.adopt, ids("abcd"))
    assert cache.adopt(ids("abcd"), None, "host") is not None
    cache.check(0, 0)


def test_a_match_raises_the_failure_of_a_policy() -> None:
    cache = tiered(eviction="survival")
    for policy in (cache.policy, cache.offload.tiers[0].policy):
        policy.failure = PolicyError("boom")
        refused("boom", cache.match, ids("abc"), kind=PolicyError)
        policy.failure = None
