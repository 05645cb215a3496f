"""Measure the tree's operations and their growth, on the workload of other systems' figures.

python -m experiments.benchmarks.tree [--runs 5]

The workload is 2,000 conversations x 5 turns x 200-1,000 tokens, with 16 system prompts of 500
tokens and 64 live conversations. The cache has pages of 1 token, 400,000 KV tokens and 600 states.
Further runs use the same bytes as a budget, and as an arena with Qwen3-Next's rows and slabs.

Each request matches, gathers, locks, allocates (with eviction), inserts with one state at its end,
gathers again, moves the lock and unlocks. The long workload is 20 conversations x 200 turns. The
garbage collector is on. One thread, one process.

A run's mean is the cost for a user of this machine. Three figures separate costs outside the tree:

- "quiet" takes the fastest of all runs for each request, which excludes other processes.
- "cpu" is the thread's processor time, with the clocks and the caller's concatenation (two
  microseconds).
- "gc" is the time of the garbage collector during the run.

Writes bench_tree.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter_ns, thread_time_ns
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.studies.common import keep, positive
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


def measure(
    name: str,
    work: Iterable[Work],
    num_kv_tokens: int,
    num_slots: int,
    runs: int,
    bar: Any,
    memory: str = "pools",
) -> dict[str, Any]:
    """Replay ``runs`` times on new caches. Returns one record."""
    replays = []
    for _ in range(runs):
        gc.collect()
        replays.append(replay(work, new_cache(num_kv_tokens, num_slots, memory)))
        bar.update()
    last = replays[-1]
    last.cache.check(held_tokens=0, held_slots=0)
    moves = 0 if last.cache.arena is None else last.cache.arena.num_moves
    quiet = np.minimum.reduce([run.verbs for run in replays])
    means = [float(run.verbs.sum(1).mean()) / 1e3 for run in replays]
    medians = [float(np.median(run.verbs.sum(1))) / 1e3 for run in replays]
    cpu_means = [float(run.cpu.mean()) / 1e3 for run in replays]
    gc_means = [run.gc_ns / len(run.verbs) / 1e3 for run in replays]
    return {
        "measure": name,
        "requests": len(last.verbs),
        "mean_prompt_tokens": round(last.prompt_tokens / len(last.verbs)),
        "num_kv_tokens": num_kv_tokens,
        "num_slots": num_slots,
        "memory": memory,
        "slabs_moved_per_request": round(moves / len(last.verbs), 4),
        "token_hit_rate": round(last.token_hit_rate, 4),
        "evicted_per_request": round(float(last.evicted.mean()), 2),
        "request_us_mean": round(statistics.median(means), 2),
        "request_us_median": round(statistics.median(medians), 2),
        "request_us_cpu_mean": round(statistics.median(cpu_means), 2),
        "request_us_gc_mean": round(statistics.median(gc_means), 2),
        "request_us_quiet": round(float(quiet.sum(1).mean()) / 1e3, 2),
        "verb_us_median": _by_verb(np.median([np.median(run.verbs, 0) for run in replays], axis=0)),
        "runs": runs,
    }


def _by_verb(nanoseconds: np.ndarray) -> dict[str, float]:
    return {verb: round(float(ns) / 1e3, 2) for verb, ns in zip(VERBS, nanoseconds, strict=True)}


def growth(runs: int, bar: Any) -> list[dict[str, Any]]:
    """Measure the same requests, two live conversations, on caches with more and more tokens, then
    nodes."""
    records = []
    for size in (10_000, 100_000, 1_000_000):
        caches = [new_cache(size, size // 100) for _ in range(runs)]
        work = InterleavedChats(2, 900, 5)
        records.append(_grown(f"{size:,} cached tokens", caches, work, 1500, bar))
    for num_nodes in (1_000, 10_000, 100_000):
        caches = []
        for _ in range(runs):
            caches.append(new_cache(num_nodes * 10 + 400_000, num_nodes + 700))
            fill(caches[-1], num_nodes, 10)
        work = InterleavedChats(2, 900, 5, limit=500)
        record = _grown(f"{num_nodes:,} nodes", caches, work, 400, bar)
        records.append(record | _evictions(caches))
    return records


def _evictions(caches: Sequence[HybridRadixCache]) -> dict[str, float]:
    """Measure the eviction of the oldest item from a full cache, in microseconds. Takes the fastest
    of ``caches``."""
    medians = []
    for cache in caches:
        times = []
        for _ in range(500):
            begin = perf_counter_ns()
            cache.evict(num_tokens=1)
            times.append(perf_counter_ns() - begin)
        medians.append(statistics.median(times))
    return {"eviction_us_per_item": round(min(medians) / 1e3, 2)}


def _grown(
    name: str, caches: Sequence[HybridRadixCache], work: Iterable[Work], tail: int, bar: Any
) -> dict[str, Any]:
    """Return the times of the last ``tail`` requests of ``work`` by operation, and of an eviction
    per item."""
    replays = []
    for cache in caches:
        replays.append(replay(work, cache))
        bar.update()
    quiet = np.minimum.reduce([run.verbs for run in replays])[-tail:]
    evicted = int(replays[0].evicted[-tail:].sum())
    others = [index for index, verb in enumerate(VERBS) if verb != "allocate"]
    allocate = quiet[:, VERBS.index("allocate")]
    without_allocation = quiet[:, others].sum(1)
    last = replays[-1].cache
    return {
        "measure": name,
        "tail_requests": tail,
        "cached_tokens": last.cached_tokens,
        "nodes": last.num_nodes,
        "token_hit_rate": round(replays[-1].token_hit_rate, 4),
        "us_without_allocation": round(float(np.median(without_allocation)) / 1e3, 2),
        "eviction_us_per_item": round(float(allocate.sum()) / max(evicted, 1) / 1e3, 2),
        "verb_us_median": _by_verb(np.median(quiet, axis=0)),
    }


def memory() -> dict[str, Any]:
    """Measure host bytes per cached token, node and ghost token, from two fills of different
    shape."""

    def traced(num_nodes: int, tokens_each: int, work: Callable[[HybridRadixCache], object]) -> int:
        """Return the bytes that ``work`` adds to a cache with room for these nodes."""
        cache = new_cache(num_nodes * tokens_each, num_nodes)
        gc.collect()
        tracemalloc.start()
        work(cache)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return used

    def filled_and_evicted(cache: HybridRadixCache) -> None:
        fill(cache, 2_000, 600)
        cache.evict(num_tokens=2_000 * 600)

    def filled_and_split(cache: HybridRadixCache) -> None:
        fill(cache, 5_000, 20)
        fill(cache, 5_000, 10)
        assert cache.num_nodes == cache.num_checkpoints == 10_000

    few = traced(200, 10_000, lambda cache: fill(cache, 200, 10_000))
    many = traced(20_000, 10, lambda cache: fill(cache, 20_000, 10))
    node_bytes = (many - few * 200_000 / 2_000_000) / (20_000 - 200 * 200_000 / 2_000_000)
    split = traced(10_000, 11, filled_and_split)
    ghosts = traced(2_000, 600, filled_and_evicted)
    return {
        "measure": "host memory",
        "bytes_per_cached_token": round((few - 200 * node_bytes) / 2_000_000, 2),
        "bytes_per_node": round(node_bytes),
        "bytes_per_node_of_a_pair_cut_by_a_split": round((split - 8 * 100_000) / 10_000),
        "bytes_per_ghost_token_of_600_token_nodes": round(ghosts / 1_200_000, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=positive, default=5, help="replays per workload")
    runs = parser.parse_args().runs
    with tqdm(total=11 * runs) as bar:
        short, long = InterleavedChats(64, 2000, 5), InterleavedChats(64, 20, 200)
        records = [measure("request", short, 400_000, 600, runs, bar)]
        records += [
            measure(f"request, {memory}", short, 400_000, 600, runs, bar, memory)
            for memory in ("budget", "arena")
        ]
        records.append(measure("long request, roomy", long, 3_000_000, 6_000, runs, bar))
        records.append(measure("long request, same pools", long, 400_000, 600, runs, bar))
        records += growth(runs, bar)
        records.append(memory())
    keep("bench_tree", records)
    for record in records:
        print(*(f"{key} {value}" for key, value in record.items()), sep="; ")


if __name__ == "__main__":
    main()
