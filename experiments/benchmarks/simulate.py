"""Measure the simulator on one core: time per request, its parts, and memory of a million requests.

    python -m experiments.benchmarks.simulate            # every policy, some minutes
    python -m experiments.benchmarks.simulate --quick    # two policies
    python -m experiments.benchmarks.simulate --default  # the default pair against LRU, a minute

Runs chat-like traces at 12 GiB with the placement ``branch,boundary,backoff,end``: 320 requests of
3,700 tokens, 120 of 500, 320 of 2,200, 320 of 11,000, and 10,000 of 2,100 with 64 live
conversations. Reports the median of the runs, without generating the trace. The garbage collector
keeps its settings, but garbage of earlier runs is collected before the clock starts.

``--default`` times the default policies and LRU with the placement above, in alternated runs at
sizes where both evict. A request's time includes lease, tree, policies and the simulator's loop.

LRU also has a floor: the same requests, slots, checkpoints and evictions in the same order, as a
bare loop over the tree's operations without leases, placement, serving and records. The time per
request is reported by operation.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import process_time, process_time_ns
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from experiments.provenance import RESULTS, write_json_lines
from experiments.studies.common import STATIC_PLACEMENT
from hybridcache import (
    ModelGeometry,
    Placed,
    Prefill,
    Trace,
    TraceRequest,
    build_prefix_cache,
)
from hybridcache.cache import HybridRadixCache
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.generators import GENERATORS
from hybridcache.lab.simulation.serving import Serving, serve
from hybridcache.lab.simulation.sweep import collect_seldom
from hybridcache.lab.simulation.target import LeaseTarget, RunConfig, build_target
from hybridcache.policies.placement.rules import Placement
from hybridcache.policies.registry import EVICTION
from hybridcache.tokens import Tokens

GEOMETRY = ModelGeometry.preset("qwen3-next")
CONFIG = RunConfig(GEOMETRY, policy="lru", checkpoints=STATIC_PLACEMENT)
SERVING = Serving(Roofline.fitting(GEOMETRY))
TRACES = ("chat", "short", "few-shot", "agent", "conversations")
REPEATS = 5
PRESSED_GIB = {"chat": 6, "agent": 3, "short": 1.5, "conversations": 12, "tree-search": 0.75}
"""Sizes at which both evict, in GiB."""
VERBS = ("match", "touch", "lock", "unlock", "allocate_slot", "allocate_kv", "insert")
"""Timed operations. ``free_kv`` and ``free_slot`` count as code around the tree."""


def lease_target(config: RunConfig) -> LeaseTarget:
    target = build_target(config, unit=1)
    assert isinstance(target, LeaseTarget)
    return target


def seconds_of(work: Callable[[], object]) -> float:
    """Return the processor seconds of ``work``."""
    gc.collect()
    start = process_time()
    work()
    return process_time() - start


def seconds_served(requests: Sequence[TraceRequest], target: LeaseTarget) -> float:
    return seconds_of(lambda: serve(target, requests, 1, SERVING))


def requests_per_s(requests: Sequence[TraceRequest], config: RunConfig) -> float:
    """Return the requests served per second of processor time, as the median of ``REPEATS``
    runs."""
    seconds = [seconds_served(requests, lease_target(config)) for _ in range(REPEATS)]
    return len(requests) / statistics.median(seconds)


class Work(NamedTuple):
    """One request with all decisions that a lease makes."""

    prompt: Tokens
    everything: Tokens
    """Prompt and answer without the last token, which is never computed."""
    saved: tuple[Placed, ...]
    """Checkpoints of the prefill, the most valuable first."""
    boundary: int
    """Last grid position of ``everything``. Decode saves there if it is after the prompt."""


class RecordingPlacement(Placement):
    """Placement that records its decisions: on the grid, each position once."""

    def __init__(self, inner: Placement) -> None:
        super().__init__(inner.rules, inner.cap)
        self.decided: list[tuple[Placed, ...]] = []

    def plan(self, prefill: Prefill) -> list[Placed]:
        """Return the plan of ``Placement`` and record it."""
        found = prefill.on_grid(super().plan(prefill))
        placed = [Placed(position, label) for position, label in found.items()]
        self.decided.append(tuple(placed))
        return placed


def decisions_of(requests: Sequence[TraceRequest], config: RunConfig) -> tuple[list[Work], int]:
    """Return the decisions of a simulation of ``requests``, and its number of cached tokens."""
    target = lease_target(config)
    placement = RecordingPlacement(config.placement(1))
    target.placement = placement
    log = serve(target, requests, 1, SERVING)
    assert log.num_bypassed == 0
    work = []
    for request, saved in zip(requests, placement.decided, strict=True):
        everything = np.concatenate((request.tokens, request.output[:-1]))
        boundary = len(everything) - len(everything) % config.grid
        work.append(Work(everything[: len(request.tokens)], everything, saved, boundary))
    return work, sum(log.cached_tokens)


def bare_loop(cache: HybridRadixCache, work: Sequence[Work]) -> int:
    """Apply the operations of leases to ``cache`` with pages of one token. Returns the number of
    cached tokens."""
    cached_tokens = 0
    rows = np.empty(max(len(request.everything) for request in work), np.int32)
    for prompt, everything, saved, boundary in work:
        num_tokens = len(prompt)
        match = cache.match(prompt)
        cached_len = match.cached_len
        receipt = cache.lock(match.node)
        own_slot = cache.allocate_slot()
        rows[cached_len:num_tokens] = cache.allocate_kv(num_tokens - cached_len)
        cache.touch(match)
        slots = [(position, cache.allocate_slot()) for position, _ in saved]
        labels = [label for _, label in saved]
        _, duplicates, rejected, node = cache.insert(
            prompt, rows[:num_tokens], slots, None, cached_len, labels, match.node
        )
        if len(duplicates):
            cache.free_kv(duplicates)
        moved = cache.lock(node)
        cache.unlock(receipt)
        if len(everything) > num_tokens:
            rows[num_tokens : len(everything)] = cache.allocate_kv(len(everything) - num_tokens)
            slots = [(boundary, cache.allocate_slot())] if boundary > num_tokens else []
            labels = ["decode"] * len(slots)
            _, _, more, _ = cache.insert(
                everything, rows[: len(everything)], slots, None, num_tokens, labels, node
            )
            rejected += more
        for slot in (own_slot, *rejected):
            cache.free_slot(slot)
        cache.unlock(moved)
        cached_tokens += cached_len
    return cached_tokens


def floor_per_s(requests: Sequence[TraceRequest], config: RunConfig) -> float:
    """Return the requests per second of the bare loop, as the median of ``REPEATS`` runs.

    The cache has a budget of the same bytes, because the bare loop cannot hold rows of an arena.
    """
    config = replace(config, memory="budget")
    work, cached_tokens = decisions_of(requests, config)
    caches = [build_prefix_cache(config.cache_config(unit=1)) for _ in range(REPEATS + 1)]
    assert bare_loop(caches.pop(), work) == cached_tokens
    seconds = [seconds_of(partial(bare_loop, cache, work)) for cache in caches]
    return len(requests) / statistics.median(seconds)


class Timed:
    """Cache with a timer on each operation."""

    def __init__(self, cache: HybridRadixCache) -> None:
        self._cache = cache
        self.calls: Counter[str] = Counter()
        self.nanoseconds: Counter[str] = Counter()
        for verb in VERBS:
            setattr(self, verb, self.timed(verb, getattr(cache, verb)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def timed(self, verb: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = process_time_ns()
            result = method(*arguments)
            self.nanoseconds[verb] += process_time_ns() - start
            self.calls[verb] += 1
            return result

        return timed

    @property
    def stopwatch_ns(self) -> float:
        """Smallest time in nanoseconds that the timer adds to a call."""
        clock = Timed(self._cache)
        nothing = clock.timed("nothing", lambda: None)
        found = []
        for _ in range(100):
            clock.nanoseconds.clear()
            for _ in range(100):
                nothing()
            found.append(clock.nanoseconds["nothing"] / 100)
        return min(found)


def parts(requests: Sequence[TraceRequest], config: RunConfig) -> dict[str, Any]:
    """Return microseconds and calls per request by operation, as the minimum of ``3 * REPEATS``
    runs.

    ``around`` is the time outside these operations.
    """
    target = lease_target(config)
    stopwatch_ns = Timed(target.cache).stopwatch_ns
    whole_ns: list[float] = []
    verb_ns: dict[str, list[float]] = {verb: [] for verb in VERBS}
    calls: Counter[str] = Counter()
    for _ in range(3 * REPEATS):
        whole_ns.append(seconds_served(requests, lease_target(config)) * 1e9)
        target = lease_target(config)
        clock = Timed(target.cache)
        target.cache = clock  # type: ignore[assignment]
        serve(target, requests, 1, SERVING)
        calls = clock.calls
        for verb in VERBS:
            verb_ns[verb].append(clock.nanoseconds[verb] - stopwatch_ns * calls[verb])
    least = {verb: min(spent) for verb, spent in verb_ns.items()}
    least["around"] = min(whole_ns) - sum(least.values())
    return {
        "us": {part: round(spent / len(requests) / 1e3, 1) for part, spent in least.items()},
        "calls": {verb: round(calls[verb] / len(requests), 2) for verb in VERBS},
    }


def compare_default() -> list[dict[str, Any]]:
    """Time the default policies against LRU with ``STATIC_PLACEMENT``, in alternated runs."""
    records = []
    for trace, gib in tqdm(PRESSED_GIB.items(), unit=" traces", disable=None):
        requests = tuple(GENERATORS[trace]())
        configs = {
            "lru": replace(CONFIG, budget_bytes=int(gib * GIB)),
            "default": RunConfig(GEOMETRY, budget_bytes=int(gib * GIB)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in configs}
        hit_rates = {}
        for _ in range(2 * REPEATS):
            for name, config in configs.items():
                target = lease_target(config)
                seconds[name].append(seconds_served(requests, target))
                total = target.cache.stats.total
                hit_rates[name] = total.cached_tokens / total.prompt_tokens
        us = {name: statistics.median(runs) / len(requests) * 1e6 for name, runs in seconds.items()}
        record: dict[str, Any] = {"trace": trace, "gib": gib, "requests": len(requests)}
        for name in configs:
            record[f"{name}_us"] = round(us[name])
            record[f"{name}_token_hit_rate"] = round(hit_rates[name], 3)
        # Each run is compared with the next one, because the speed of the machine changes.
        pairs = zip(seconds["default"], seconds["lru"], strict=True)
        records.append(
            record | {"ratio": round(statistics.median(own / lru for own, lru in pairs), 2)}
        )
    return records


def many_requests(count: int) -> None:
    """Serve ``count`` requests of three-turn chats and print requests per second and peak MiB.

    Must run in a separate process, because the peak is that of the process.
    """
    trace: Trace = GENERATORS["conversations"](num_conversations=count // 3, turns=3)
    config = replace(CONFIG, budget_bytes=40 * GIB)
    start = process_time()
    log = serve(build_target(config, 1), trace, 1, SERVING)
    seconds = process_time() - start
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(len(log.turns) / seconds, peak_mib)


def main() -> None:
    collect_seldom()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="run only two policies")
    parser.add_argument("--default", action="store_true", help="compare the default pair with LRU")
    parser.add_argument("--million", type=int, default=1_000_000, help="requests of the memory run")
    parser.add_argument("--only-million", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    records: list[dict[str, Any]]
    if options.only_million:
        many_requests(options.million)
        return
    if options.default:
        records = compare_default()
        write_json_lines(RESULTS / "bench_simulate_default.jsonl", records)
        for record in records:
            print(record)
        return
    policies = ["lru", "survival"] if options.quick else sorted(EVICTION)
    records = []
    jobs = [(policy, trace) for policy in policies for trace in TRACES]
    for policy, trace in tqdm(jobs, unit=" runs", disable=None):
        config = replace(CONFIG, budget_bytes=12 * GIB, policy=policy)
        requests = tuple(GENERATORS[trace]())
        record: dict[str, Any] = {"policy": policy, "trace": trace}
        record["requests_per_s"] = round(requests_per_s(requests, config))
        if policy == "lru":
            record["floor_per_s"] = round(floor_per_s(requests, config))
            record |= parts(requests[:2000], config)
        records.append(record)
    command = [sys.executable, "-m", "experiments.benchmarks.simulate", "--only-million"]
    done = subprocess.run(
        [*command, "--million", str(options.million)], capture_output=True, text=True, check=True
    )
    rate, peak_mib = map(float, done.stdout.split())
    records.append(
        {
            "policy": "lru",
            "trace": f"{options.million} requests, generated as they are served",
            "requests_per_s": round(rate),
            "peak_mib": round(peak_mib),
        }
    )
    write_json_lines(RESULTS / "bench_simulate.jsonl", records)
    for record in records:
        print(record)


if __name__ == "__main__":
    main()
