"""Tree workload of published systems' measurements, and a replay that times each operation."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter_ns, thread_time_ns
from typing import Any, NamedTuple

import numpy as np

from hybridcache import CacheConfig, HybridRadixCache, build_prefix_cache
from hybridcache.allocators.moves import Indices, Move
from hybridcache.lab.traces.generators import conversations

VERBS = ("match", "gather", "lock", "allocate", "touch", "insert", "gather again", "unlock")
"""Operations that are timed separately.

"allocate" includes KV, slot and their eviction. "unlock" moves the lock to the new node and
releases it.
"""


ROW_BYTES, SLAB_ROWS = 24_576, 3144


class Work(NamedTuple):
    """One request of a workload."""

    prompt: np.ndarray
    everything: np.ndarray
    """Prompt and answer."""


class TreeReplay(NamedTuple):
    """One replay."""

    verbs: np.ndarray
    """Nanoseconds, int64[requests, operations]."""
    cache: HybridRadixCache
    token_hit_rate: float
    prompt_tokens: int
    evicted: np.ndarray
    """Items evicted by each request, int64[requests]."""
    cpu: np.ndarray
    """Nanoseconds of processor time, int64[requests]."""
    gc_ns: int
    """Processor time of the garbage collector over all requests."""


class CollectorClock:
    """Context that measures the processor time of the garbage collector."""

    def __enter__(self) -> CollectorClock:
        self.nanoseconds = self._began = 0
        gc.callbacks.append(self._collected)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._collected)

    def _collected(self, phase: str, _: object) -> None:
        if phase == "start":
            self._began = thread_time_ns()
        else:
            self.nanoseconds += thread_time_ns() - self._began


@dataclass(frozen=True, slots=True)
class InterleavedChats:
    """Interleaved conversations of a few turns, generated again for each replay to save memory."""

    live: int
    num_conversations: int
    turns: int
    limit: int | None = None

    def __iter__(self) -> Iterator[Work]:
        trace = conversations(self.live, self.num_conversations, self.turns)
        for request in trace if self.limit is None else trace.head(self.limit):
            everything = np.concatenate((request.tokens, request.output))
            yield Work(everything[: len(request.tokens)], everything)


def new_cache(
    num_kv_tokens: int, num_slots: int, memory: str = "pools", eviction: str = "lru"
) -> HybridRadixCache:
    """Return a cache with two pools, or with the same bytes in one arena. Sizes are those of
    Qwen3-Next."""
    state_bytes = SLAB_ROWS * ROW_BYTES
    shares: dict[str, Any] = {"num_kv_tokens": num_kv_tokens, "num_slots": num_slots}
    if memory != "pools":
        total_bytes = num_kv_tokens * ROW_BYTES + num_slots * state_bytes
        shares = {"memory": memory, "total_bytes": total_bytes}
    sizes = {"kv_bytes_per_token": ROW_BYTES, "state_bytes": state_bytes}
    cache = build_prefix_cache(CacheConfig(grid=1, eviction=eviction, **sizes, **shares))
    assert isinstance(cache, HybridRadixCache)
    return cache


class HeldRows:
    """Rows of the current request. An arena may move them before they are inserted."""

    rows: Indices | None = None

    def rows_moved(self, move: Move) -> int:
        assert self.rows is not None
        return len(move.rename(self.rows))


def replay(work: Iterable[Work], cache: HybridRadixCache) -> TreeReplay:
    """Serve ``work`` and time each operation. The caller's concatenation of rows is not counted."""
    with CollectorClock() as collector:
        run = _replay(work, cache)
    return run._replace(gc_ns=collector.nanoseconds)


def _replay(work: Iterable[Work], cache: HybridRadixCache) -> TreeReplay:
    verbs: list[tuple[int, ...]] = []
    evicted: list[int] = []
    cpu: list[int] = []
    cached_tokens = prompt_tokens = 0
    held, now = HeldRows(), perf_counter_ns
    if cache.arena is not None:
        cache.arena.holders[held] = None
    for prompt, everything in work:
        evictions = cache.stats.evictions
        end = len(everything)
        began = thread_time_ns()
        t0 = now()
        match = cache.match(prompt)
        t1 = now()
        cached_rows = cache.gather(match.node)
        t2 = now()
        receipt = cache.lock(match.node)
        t3 = now()
        held.rows = new = cache.allocate_kv(end - match.cached_len)
        slot = cache.allocate_slot()
        t4 = now()
        cache.touch(match)
        t5 = now()
        assert new is not None and slot is not None, "the pools are too small for this workload"
        rows = np.concatenate((cached_rows, new))
        t6 = now()
        result = cache.insert(
            everything, rows, ((end, slot),), None, match.cached_len, (), match.node
        )
        t7 = now()
        cache.gather(result.node)
        t8 = now()
        moved = cache.lock(result.node)
        cache.unlock(receipt)
        cache.unlock(moved)
        t9 = now()
        cpu.append(thread_time_ns() - began)
        if len(result.duplicates):
            cache.free_kv(result.duplicates)
        for rejected in result.rejected_slots:
            cache.free_slot(rejected)
        verbs.append((t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4, t7 - t6, t8 - t7, t9 - t8))
        cache.take_step().done()
        evicted.append(cache.stats.evictions - evictions)
        cached_tokens += match.cached_len
        prompt_tokens += len(prompt)
    rate = cached_tokens / prompt_tokens
    return TreeReplay(
        np.array(verbs), cache, rate, prompt_tokens, np.array(evicted), np.array(cpu), gc_ns=0
    )


def fill(cache: HybridRadixCache, num_nodes: int, tokens_each: int) -> None:
    """Add ``num_nodes`` leaves with a checkpoint each below the root. Longer existing leaves are
    split."""
    for number in range(num_nodes):
        tokens = np.arange(tokens_each, dtype=np.int32)
        tokens[0] = 1_000_000 + number
        rows, slot = cache.allocate_kv(tokens_each), cache.allocate_slot()
        assert rows is not None and slot is not None
        result = cache.insert(tokens, rows, ((tokens_each, slot),))
        cache.free_kv(result.duplicates)
