"""Measure the tree's operations and their growth, on the workload of other systems' figures.

python -m experiments.benchmarks.tree [--runs 5] [--quick]

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

Writes results/bench_tree.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.benchmarks.tree_work import VERBS, Work, Workload, fill, new_cache, replay
from experiments.provenance import RESULTS, write_json_lines
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
    means = sorted(float(run.verbs.sum(1).mean()) / 1e3 for run in replays)
    medians = sorted(float(np.median(run.verbs.sum(1))) / 1e3 for run in replays)
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
        "request_us_mean_spread": [round(means[0], 2), round(means[-1], 2)],
        "request_us_median": round(statistics.median(medians), 2),
        "request_us_median_spread": [round(medians[0], 2), round(medians[-1], 2)],
        "request_us_cpu_mean": round(statistics.median(cpu_means), 2),
        "request_us_gc_mean": round(statistics.median(gc_means), 2),
        "request_us_quiet": round(float(quiet.sum(1).mean()) / 1e3, 2),
        "request_us_quiet_median": round(float(np.median(quiet.sum(1))) / 1e3, 2),
        "verb_us_mean": _by_verb(np.median([run.verbs.mean(0) for run in replays], axis=0)),
        "verb_us_median": _by_verb(np.median([np.median(run.verbs, 0) for run in replays], axis=0)),
        "verb_us_quiet": _by_verb(quiet.mean(0)),
        "runs": runs,
    }


def _by_verb(nanoseconds: np.ndarray) -> dict[str, float]:
    return {verb: round(float(ns) / 1e3, 2) for verb, ns in zip(VERBS, nanoseconds, strict=True)}


def match_alone(runs: int) -> dict[str, Any]:
    """Measure the matching of prompts of about 2,000 tokens, four turns deep, in a full cache, in
    microseconds."""
    work = Workload(64, 400, 5)
    cache = new_cache(400_000, 600)
    replay(work, cache)
    recent = [w.prompt for w in list(work)[-600:] if 1900 <= len(w.prompt) <= 2100]
    best = np.full(len(recent), np.iinfo(np.int64).max)
    medians, means = [], []
    for _ in range(5 * runs):
        times = []
        for prompt in recent:
            begin = perf_counter_ns()
            cache.match(prompt)
            times.append(perf_counter_ns() - begin)
        medians.append(statistics.median(times))
        means.append(statistics.mean(times))
        best = np.minimum(best, times)
    return {
        "measure": "match alone, prompts of 1,900-2,100 tokens",
        "prompts": len(recent),
        "match_us_median": round(statistics.median(medians) / 1e3, 2),
        "match_us_mean": round(statistics.median(means) / 1e3, 2),
        "match_us_quiet": round(float(best.mean()) / 1e3, 2),
    }


def growth(runs: int, bar: Any, quick: bool) -> list[dict[str, Any]]:
    """Measure the same requests, two live conversations, on caches with more and more tokens, then
    nodes."""
    factor = 10 if quick else 1
    records = []
    for size in (10_000, 100_000, 1_000_000 // factor):
        work = Workload(2, 900 // factor, 5)
        caches = [new_cache(size, size // 100) for _ in range(runs)]
        records.append(_grown(f"{size:,} cached tokens", caches, work, 1500 // factor, bar))
    for num_nodes in (1_000, 10_000, 100_000 // factor):
        caches = []
        for _ in range(runs):
            caches.append(new_cache(num_nodes * 10 + 400_000, num_nodes + 700))
            fill(caches[-1], num_nodes, 10)
        work = Workload(2, 900, 5, limit=500 // factor)
        record = _grown(f"{num_nodes:,} nodes", caches, work, 400 // factor, bar)
        record |= _evictions(caches)
        records.append(record)
    return records


def _evictions(caches: Sequence[HybridRadixCache]) -> dict[str, float]:
    """Measure the eviction of the oldest item from a full cache, in microseconds. Takes the fastest
    of ``caches``."""
    medians, means = [], []
    for cache in caches:
        times = []
        for _ in range(500):
            begin = perf_counter_ns()
            cache.evict(num_tokens=1)
            times.append(perf_counter_ns() - begin)
        medians.append(statistics.median(times))
        means.append(statistics.mean(times))
    return {
        "eviction_us_per_item": round(min(medians) / 1e3, 2),
        "eviction_us_per_item_mean": round(min(means) / 1e3, 2),
    }


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
        "us_without_allocation_mean": round(float(without_allocation.mean()) / 1e3, 2),
        "eviction_us_per_item": round(float(allocate.sum()) / max(evicted, 1) / 1e3, 2),
        "verb_us_median": _by_verb(np.median(quiet, axis=0)),
    }


def memory() -> dict[str, Any]:
    """Measure host bytes per cached token, node and ghost token, from two fills of different
    shape."""

    def traced(num_nodes: int, tokens_each: int, evict: bool) -> int:
        cache = new_cache(num_nodes * tokens_each, num_nodes)
        gc.collect()
        tracemalloc.start()
        fill(cache, num_nodes, tokens_each)
        if evict:
            cache.evict(num_tokens=num_nodes * tokens_each)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return used

    def traced_workload() -> tuple[int, HybridRadixCache]:
        cache = new_cache(400_000, 600)
        work = list(Workload(64, 200, 5))
        gc.collect()
        tracemalloc.start()
        replay(work, cache)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return used, cache

    def traced_splits() -> float:
        """Return the bytes per node, without tokens, after each node with a checkpoint is split."""
        num_nodes, half = 5_000, 10
        cache = new_cache(2 * half * num_nodes + half, 2 * num_nodes)
        gc.collect()
        tracemalloc.start()
        fill(cache, num_nodes, 2 * half)
        fill(cache, num_nodes, half)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert cache.num_nodes == cache.num_checkpoints == 2 * num_nodes
        return (used - 8 * cache.cached_tokens) / cache.num_nodes

    used, cache = traced_workload()
    allowed = 12 * cache.cached_tokens + 1024 * cache.num_nodes + 8 * cache.ghost_tokens
    few, many = traced(200, 10_000, False), traced(20_000, 10, False)
    node_bytes = (many - few * 200_000 / 2_000_000) / (20_000 - 200 * 200_000 / 2_000_000)
    return {
        "measure": "host memory",
        "bytes_per_cached_token": round((few - 200 * node_bytes) / 2_000_000, 2),
        "bytes_per_node": round(node_bytes),
        "bytes_per_node_of_a_pair_cut_by_a_split": round(traced_splits()),
        "workload_bytes": used,
        "workload_bytes_allowed_by_the_goal": allowed,
        "bytes_per_ghost_token_of_600_token_nodes": round(traced(2_000, 600, True) / 1_200_000, 2),
    }


def import_time(runs: int) -> dict[str, Any]:
    """Measure the seconds that ``import hybridcache`` adds to an interpreter, and numpy's share."""

    def seconds(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return float(output.stdout)

    ours = sorted(seconds("import hybridcache") for _ in range(2 * runs + 1))
    numpys = sorted(seconds("import numpy") for _ in range(2 * runs + 1))
    code = "import sys, hybridcache; print('torch' in sys.modules)"
    loads_torch = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return {
        "measure": "import hybridcache",
        "seconds_median": round(statistics.median(ours), 3),
        "seconds_fastest": round(ours[0], 3),
        "seconds_numpy_alone": round(statistics.median(numpys), 3),
        "imports_torch": loads_torch.stdout.strip() == b"True",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="replays per workload")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, a minute")
    options = parser.parse_args()
    runs = 2 if options.quick else options.runs
    with tqdm(total=11 * runs + 3) as bar:
        short = Workload(64, 200 if options.quick else 2000, 5)
        records = [measure("request", short, 400_000, 600, runs, bar)]
        records += [
            measure(f"request, {memory}", short, 400_000, 600, runs, bar, memory)
            for memory in ("budget", "arena")
        ]
        long = Workload(64, 20, 200, 400 if options.quick else None)
        records.append(measure("long request, roomy", long, 3_000_000, 6_000, runs, bar))
        records.append(measure("long request, same pools", long, 400_000, 600, runs, bar))
        records.append(match_alone(runs))
        bar.update()
        records += growth(runs, bar, options.quick)
        records.append(memory())
        bar.update()
        records.append(import_time(runs))
        bar.update()
    name = "bench_tree_quick" if options.quick else "bench_tree"
    write_json_lines(RESULTS / f"{name}.jsonl", records)
    for record in records:
        print(*(f"{key} {value}" for key, value in record.items()), sep="; ")
    print(RESULTS / f"{name}.jsonl")


if __name__ == "__main__":
    main()
