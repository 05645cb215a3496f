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
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.benchmarks.tree_work import VERBS, InterleavedChats, Work, fill, new_cache, replay
from experiments.studies.common import keep, positive
from hybridcache import HybridRadixCache


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
