"""Cost of cache operations, counted in visited nodes, and the memory that they leave behind.

The cost of a request must not grow with the cached data of other requests.
"""

from __future__ import annotations

import gc
import timeit
import tracemalloc
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.eviction.marconi import Marconi
from hybridcache.policies.eviction.survival import Survival
from hybridcache.policies.user import GuardedEviction
from hybridcache.radix.cache import HybridRadixCache, LockHandle
from hybridcache.radix.tree import RadixNode
from hybridcache.radix.warm_state import write_memory
from tests.policies.items import FakeItem
from tests.radix.serving import hybrid, ids, publish

STEP = 16


class Steps:
    """Count of reads of ``RadixNode.parent`` and ``children``. A walk makes at least one per
    node."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    counter = Steps()
    for name in ("parent", "children"):
        slot = getattr(RadixNode, name)

        def read(node: RadixNode, slot=slot) -> object:
            counter.count += 1
            return slot.__get__(node)

        monkeypatch.setattr(RadixNode, name, property(read, slot.__set__))
    return counter


def chain(num_states: int, **options: object) -> tuple[HybridRadixCache, LockHandle]:
    """Build a path of ``num_states`` nodes with a checkpoint each. Return also the lock of its
    end."""
    cache = hybrid(num_states * STEP + 100, num_states + 4, **options)
    prompt = ids(range(num_states * STEP))
    rows = cache.allocate_kv(len(prompt))
    assert rows is not None
    node, handle = None, cache.lock(None)
    for end in range(STEP, len(prompt) + 1, STEP):
        slot = cache.allocate_slot()
        assert slot is not None
        node = cache.insert(
            prompt[:end], rows[:end], [(end, slot)], None, end - STEP, (), node
        ).node
        cache.unlock(handle)
        handle = cache.lock(node)
    match = cache.match(ids(prompt, [7]))
    assert (match.cached_len, cache.num_nodes) == (len(prompt), num_states)
    assert cache.gather(match.node).tolist() == rows.tolist()
    return cache, handle


def test_the_cost_per_inserted_checkpoint_is_constant(steps: Steps) -> None:

    def count(num: int, published_before: bool) -> int:
        cache = hybrid(num * STEP + 100, num + 4)
        prompt = ids(range(num * STEP))
        rows = cache.allocate_kv(len(prompt))
        states = [(end, cache.allocate_slot()) for end in range(STEP, len(prompt) + 1, STEP)]
        if published_before:
            cache.insert(prompt, rows)
        before = steps.count
        result = cache.insert(prompt, rows, states, owned_from=len(prompt) * published_before)
        spent = steps.count - before
        assert not result.rejected_slots
        cache.check(held_tokens=0, held_slots=0)
        return spent

    for published_before in (False, True):
        few, many = count(50, published_before), count(800, published_before)
        assert many < 1.2 * 16 * few


@pytest.mark.parametrize("eviction", ["lru", "fifo", "sieve", "gdsf", "survival"])
def test_the_cost_of_saving_or_evicting_a_checkpoint_is_independent_of_depth(
    steps: Steps, eviction: str
) -> None:
    """The deeper path exceeds the limit of recursion. A cost that grew with depth would be 20 times
    as high; steps over tombstones are some more."""
    saved, evicted = [], []
    for num_states in (100, 2000):
        cache, handle = chain(num_states, eviction=eviction)
        steps.count = 0
        write_memory(cache)
        saved.append(steps.count / num_states)
        steps.count = 0
        assert cache.evict(num_slots=num_states - 1).num_slots == num_states - 1
        evicted.append(steps.count / num_states)
        cache.check()
        cache.unlock(handle)
        cache.reset()
        cache.check(held_tokens=0, held_slots=0)
    assert saved[1] <= 1.2 * saved[0] and evicted[1] <= 4 * evicted[0]


OWN = partial(GuardedEviction, "own", LRU())  # has no candidate of the other kind


@pytest.mark.parametrize(
    ("make", "kind"), [(LRU, "kv"), (Marconi, "kv"), (Survival, "kv"), (OWN, "checkpoint")]
)
def test_a_victim_is_found_as_fast_among_many_candidates_as_after_them(make, kind) -> None:
    policy, items = make(), [FakeItem("tail", "kv", dead=True) for _ in range(30_000)]
    for item in items:
        policy.add(item)
    among = min(timeit.repeat(lambda: policy.victim(kind), number=1, repeat=99))
    for item in items[:-1]:
        policy.discard(item, evicted=True)
    after = min(timeit.repeat(lambda: policy.victim(kind), number=1, repeat=99))
    assert max(among, after) < 20 * min(among, after)


def with_locked_paths(num_live: int, num_nodes: int) -> tuple[HybridRadixCache, list[LockHandle]]:
    """Build ``num_live`` locked paths of ``num_nodes`` nodes under a shared path of the same
    length. The pool is full. Returns the cache and the locks."""
    length = num_nodes * STEP
    cache = hybrid(length * (num_live + 1) + 40, 4)
    publish(cache, ids(range(length)), [length])
    handles = []
    for index in range(num_live):
        base = 10**6 * (index + 1)
        prompt = np.concatenate([ids(range(length)), ids(range(base, base + length))])
        match = cache.match(prompt)
        handle = cache.lock(match.node)
        new = cache.allocate_kv(length)
        assert new is not None
        rows = np.concatenate([cache.gather(match.node), new])
        node = match.node
        for end in range(length + STEP, 2 * length + 1, STEP):
            node = cache.insert(prompt[:end], rows[:end], owned_from=end - STEP, after=node).node
            cache.unlock(handle)
            handle = cache.lock(node)
        handles.append(handle)
    return cache, handles


def test_the_cost_of_an_allocation_ignores_unchanged_locked_paths(steps: Steps) -> None:
    counts = []
    for num_live, num_nodes in ((2, 20), (2, 160), (16, 20)):
        cache, handles = with_locked_paths(num_live, num_nodes)
        assert cache.allocate_kv(10**6) is None
        steps.count = 0
        for index in range(20):
            publish(cache, ids(range(10**8 + 10 * index, 10**8 + 10 * index + 10)))
        counts.append(steps.count)
        cache.check()
        for handle in handles:
            cache.unlock(handle)
    assert cache.stats.evicted_tokens >= 160
    assert max(counts) <= 1.2 * counts[0]


def test_a_lock_costs_two_steps_and_locked_paths_are_counted_once_per_change(steps: Steps) -> None:
    cache, handles = with_locked_paths(2, 100)
    assert cache.allocate_kv(10**6) is None
    match = cache.match(ids(range(100 * STEP), [7]))
    steps.count = 0
    for _ in range(50):
        cache.unlock(cache.lock(match.node))
    assert steps.count <= 2 * 50
    assert cache.allocate_kv(10**6) is None
    steps.count = 0
    assert cache.allocate_kv(10**6) is None
    assert steps.count == 0
    for handle in handles:
        cache.unlock(handle)


@pytest.mark.full("lru")
@pytest.mark.parametrize("eviction", ["lru", "gdsf"])
def test_tokens_and_rows_are_freed_while_a_queue_lists_their_node(eviction: str) -> None:
    cache = hybrid(400_000, 200, ghost_bytes=0, eviction=eviction)
    prompts = [ids(range(2000 * index, 2000 * index + 2000)) for index in range(80)]
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for prompt in prompts:
        publish(cache, prompt, [2000])
    del prompt
    cache.evict(num_slots=80)
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert cache.num_nodes == 0
    assert taken < 80 * 2048, f"{taken} bytes in an empty cache"


def test_a_lock_is_a_context_manager_and_is_released_once():
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
    result = cache.insert(np.arange(10, dtype=np.int32), cache.allocate_kv(10))
    with pytest.raises(KeyError), cache.lock(result.node):
        assert cache.protected() == (10, 0)
        raise KeyError
    assert cache.protected() == (0, 0)
    with cache.lock(result.node) as handle:
        cache.unlock(handle)
        other = cache.lock(result.node)
    assert cache.protected() == (10, 0), "leaving the block released another lock"
    cache.unlock(other)
    assert cache.protected() == (0, 0)
    cache.check(held_tokens=0, held_slots=0)
