"""``survival`` in vLLM's own manager of host memory: right in each state, and better than LRU."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make vllm, or make vllm-scheduler")

from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from hybridcache.vllm.host import SurvivalCachePolicy

CHUNK = 64
ATTENTION, STATES = 0, (1, 2, 3)


def manager_of(policy: str, num_chunks: int) -> CPUOffloadingManager:
    path = "hybridcache.vllm.host" if policy == "SurvivalCachePolicy" else None
    return CPUOffloadingManager(num_chunks, policy, path)


class Host:
    """Host tier below a device that keeps nothing: each request looks up, loads and stores."""

    def __init__(self, policy: str, num_chunks: int) -> None:
        self.manager = manager_of(policy, num_chunks)
        self.policy = self.manager._policy
        self.num_requests = self.hit_chunks = self.asked_chunks = 0

    def serve(self, path: Sequence[int], saves: Sequence[int], fails: bool = False) -> int:
        """Serve a prompt whose chunks are ``path``, and save states after ``saves`` chunks.

        Returns the number of chunks that were loaded from the host.
        """
        self.num_requests += 1
        manager, context = self.manager, ReqContext(str(self.num_requests))
        names = [
            hashlib.sha256(repr(path[: end + 1]).encode()).digest() for end in range(len(path))
        ]
        attention = [make_offload_key(name, ATTENTION) for name in names]
        states = [[make_offload_key(name, group) for group in STATES] for name in names]
        for end, keys in enumerate(zip(attention, *zip(*states, strict=True), strict=True), 1):
            for key in keys:
                context.set_offload_key_position(key, end * CHUNK)
        manager.on_new_request(context)

        def is_hit(key: Any) -> bool:
            return manager.lookup(key, context) is LookupResult.HIT

        length = next((i for i, key in enumerate(attention) if not is_hit(key)), len(path))
        resumed = min(length, len(path) - 1)
        while resumed and not all(map(is_hit, states[resumed - 1])):
            resumed -= 1
        if resumed:
            loaded = [*attention[:resumed], *states[resumed - 1]]
            manager.prepare_load(loaded, context)
            manager.complete_load(loaded, context)
        stored = [*attention[resumed:], *(key for end in saves for key in states[end - 1])]
        output = manager.prepare_store(stored, context)
        if output is not None:
            manager.complete_store(output.keys_to_store, context, success=not fails)
        manager.on_request_finished(context)
        self.hit_chunks += resumed
        self.asked_chunks += len(path)
        return resumed


def chats(seed: int, num_requests: int, num_chats: int = 12) -> list[tuple[list[int], list[int]]]:
    """Return prompts of chats that go on, between single prompts that nobody repeats."""
    draw = random.Random(seed)
    histories = [[draw.randrange(1 << 30) for _ in range(3)] for _ in range(num_chats)]
    found = []
    for _ in range(num_requests):
        if draw.random() < 0.5:
            single = [draw.randrange(1 << 30) for _ in range(draw.randrange(2, 16))]
            found.append((single, [len(single) - 1]))
            continue
        history = draw.choice(histories)
        history += [draw.randrange(1 << 30) for _ in range(draw.randrange(1, 4))]
        if len(history) > 30:
            del history[3:]
        found.append(([*history], [len(history) - 1, len(history)]))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_requests_keeps_the_invariants(seed: int) -> None:
    host, draw = Host("SurvivalCachePolicy", 60), random.Random(seed)
    assert isinstance(host.policy, SurvivalCachePolicy)
    for path, saves in chats(seed, 150):
        host.serve(path, saves, fails=draw.random() < 0.1)
        host.policy.check()
        assert host.manager._num_evictable_cache_chunks == len(host.policy._evictable)
        if draw.random() < 0.02:
            host.manager.reset_cache()
            assert not host.policy.chunks


def test_a_refused_eviction_changes_nothing() -> None:
    host = Host("SurvivalCachePolicy", 40)
    for path, saves in chats(1, 20):
        host.serve(path, saves)
    policy = host.policy
    before, first = dict(policy.chunks), [*policy._first]
    assert policy.evict(len(policy.chunks), set([*policy.chunks][:1])) is None
    assert policy.chunks == before and [*policy._first] == first
    protected = set([*policy.chunks][::2])
    victims = policy.evict(5, protected)
    assert victims is not None and len(victims) == 5
    assert not protected & {key for key, _ in victims}
    assert policy.chunks.keys() == before.keys() - {key for key, _ in victims}
    policy.check()


def test_a_chunk_being_loaded_is_not_evicted() -> None:
    host = Host("SurvivalCachePolicy", 40)
    path = [*range(8)]
    host.serve(path, [8])
    keys = [*host.policy.chunks][:4]
    context = ReqContext("reader")
    host.manager.prepare_load(keys, context)
    for number in range(40):
        host.serve([100 + number, *range(12)], [12])
    assert all(key in host.policy.chunks for key in keys)
    host.manager.complete_load(keys, context)
    host.policy.check()


def test_survival_keeps_more_of_the_chats_than_lru() -> None:
    rates = {}
    for policy in ("lru", "arc", "SurvivalCachePolicy"):
        host = Host(policy, 220)
        for path, saves in chats(3, 800):
            host.serve(path, saves)
        rates[policy] = host.hit_chunks / host.asked_chunks
    print(rates)
    assert rates["SurvivalCachePolicy"] > max(rates["lru"], rates["arc"]) + 0.05
