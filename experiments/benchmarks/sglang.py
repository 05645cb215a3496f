"""Compare this cache with SGLang's own, behind SGLang's interface: hits, and time per operation.

python -m experiments.benchmarks.sglang [--runs 3]

Needs SGLang 0.5.23 (`make sglang`). The requests are those of bench_tree: 2,000 conversations x 5
turns x 200-1,000 tokens, and 16 system prompts of 500 tokens. Both caches use SGLang's pools and
allocators, with 1.07 M KV tokens and 320 states.

Both get the same calls in the same order, with keys and indices in SGLang's types. The calls are
match, read the rows, lock, allocate (with eviction), insert with a state, read the rows again, move
the lock, and release it.

Runs alternate in one process. "quiet" takes the fastest of all runs for each request, which
excludes other processes.

"direct" is this cache by its own interface, with numpy arrays.

Placement "end" saves one state at the end of each answer. "extra_buffer" is SGLang's own: a prefill
saves one at its last 64th token or at the branch that the cache reports. Decode saves one at each
256th token, and tokens after the last state are dropped. Writes bench_sglang.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from array import array
from time import perf_counter_ns
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.benchmarks import tree
from experiments.benchmarks.tree import InterleavedChats, Work, new_cache
from experiments.studies.common import keep, plain_table, positive
from tests.sglang.cpu import stand_in, version

stand_in()

import torch  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402

from tests.sglang.pools import CHUNK, World, new_world  # noqa: E402

NUM_KV_TOKENS, NUM_SLOTS = 1_070_000, 320
DECODE_INTERVAL = 256
CACHES = [("rust", "lru"), *itertools.product(("hybridcache", "direct"), ("lru", "survival"))]


class Keys:
    """Token ids of one request in SGLang's form, prepared before the clock runs."""

    def __init__(self, work: Work) -> None:
        self.ids = array("q", work.everything.astype(np.int64).tobytes())
        self.prompt_len = len(work.prompt)


class TimedReplay:
    """Replay of requests through one cache, with timed operations."""

    def __init__(self, world: World, placement: str) -> None:
        self.world = world
        self.placement = placement
        self.times: list[int] = []
        self.cached_tokens = self.prompt_tokens = 0

    def run(self, work: list[Keys]) -> None:
        serve = self._end if self.placement == "end" else self._extra_buffer
        for keys in work:
            serve(keys)

    def _end(self, keys: Keys) -> None:
        """Serve a request with one insert at the end of the answer, with a state there."""
        cache, rows, requests = self.world
        ids, prompt_len = keys.ids, keys.prompt_len
        end = len(ids)
        began = perf_counter_ns()
        match = cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, limit=prompt_len - 1)))
        hit, node = match.device_prefix_len, match.last_device_node
        cached_rows = cache.path_device_indices(node)
        lock = cache.lock(node)
        self._make_room(end - hit)
        new, slot = rows.alloc(end - hit), requests.mamba_allocator.alloc(1)
        paused = perf_counter_ns()
        value = torch.cat((cached_rows[:hit], new))
        resumed = perf_counter_ns()
        result = cache.insert(
            InsertParams(key=RadixKey(ids), value=value, mamba_value=slot, prev_prefix_len=hit)
        )
        cache.path_device_indices(result.last_device_node)
        moved = cache.lock(result.last_device_node)
        cache.unlock(lock)
        cache.unlock(moved)
        self.times.append(perf_counter_ns() - resumed + paused - began)
        if result.mamba_exist:
            requests.mamba_allocator.free(slot)
        self._count(hit, prompt_len)

    def _extra_buffer(self, keys: Keys) -> None:
        """Save states at the positions of SGLang's scheduler: one per prefill, then every 256
        tokens."""
        cache, rows, requests = self.world
        ids, prompt_len = keys.ids, keys.prompt_len
        match = cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, limit=prompt_len - 1)))
        hit = match.device_prefix_len
        lock = cache.lock(match.last_device_node)
        held = cache.path_device_indices(match.last_device_node)[:hit]
        position = prompt_len - (prompt_len - hit) % CHUNK
        branch = match.mamba_branching_seqlen
        if branch is not None and hit < branch < prompt_len and (branch - hit) % CHUNK == 0:
            position = branch
        self._make_room(len(ids) - hit)
        held = torch.cat((held, rows.alloc(len(ids) - hit)))
        last = len(ids) // DECODE_INTERVAL * DECODE_INTERVAL
        owned = hit
        for at in (position, last if last > prompt_len else 0):
            if at <= owned:
                continue
            self._make_room(0)
            slot = requests.mamba_allocator.alloc(1)
            key = RadixKey(ids[:at])
            result = cache.insert(
                InsertParams(key=key, value=held[:at], mamba_value=slot, prev_prefix_len=owned)
            )
            if result.mamba_exist:
                requests.mamba_allocator.free(slot)
            held[:at] = cache.path_device_indices(result.last_device_node)
            moved = cache.lock(result.last_device_node)
            cache.unlock(lock)
            lock, owned = moved, at
        rows.free(held[owned:])
        cache.unlock(lock)
        self._count(hit, prompt_len)

    def _make_room(self, num_tokens: int) -> None:
        cache, rows, requests = self.world
        short = num_tokens - rows.available_size()
        if short > 0:
            cache.evict_for_alloc(EvictParams(num_tokens=short))
        if not requests.mamba_allocator.available_size():
            cache.evict_for_alloc(EvictParams(mamba_num=1))

    def _count(self, hit: int, prompt_len: int) -> None:
        self.cached_tokens += hit
        self.prompt_tokens += prompt_len


def replay(
    work: list[Keys], live: int, placement: str, backend: str, eviction: str
) -> tuple[float, np.ndarray]:
    """Return the token hit rate of a new cache, and the nanoseconds of each request."""
    gc.collect()
    if backend == "direct":
        cache = new_cache(NUM_KV_TOKENS, NUM_SLOTS, eviction=eviction)
        run = tree.replay(InterleavedChats(live, 2000, 5), cache)
        return run.token_hit_rate, run.verbs.sum(1)
    done = TimedReplay(new_world(backend, NUM_KV_TOKENS, NUM_SLOTS, eviction=eviction), placement)
    done.run(work)
    return done.cached_tokens / done.prompt_tokens, np.array(done.times)


def measure(live: int, placement: str, runs: int, bar: Any) -> list[dict[str, Any]]:
    """Run all caches on one workload, alternating, ``runs`` times."""
    work = [Keys(request) for request in InterleavedChats(live, 2000, 5)]
    caches = CACHES if placement == "end" else CACHES[:3]
    replays: dict[tuple[str, str], list[tuple[float, np.ndarray]]] = {cache: [] for cache in caches}
    for _ in range(runs):
        for cache, done in replays.items():
            done.append(replay(work, live, placement, *cache))
            bar.update()
    records = []
    for (backend, eviction), done in replays.items():
        record = {
            "cache": backend,
            "eviction": eviction,
            "placement": placement,
            "live": live,
            "requests": len(work),
            "token_hit_rate": round(done[-1][0], 4),
        }
        records.append(record | (_times(done) if placement == "end" else {}))
    return records


def _times(runs: list[tuple[float, np.ndarray]]) -> dict[str, Any]:
    requests = np.array([times for _, times in runs]) / 1e3  # [runs, requests]
    return {
        "request_us_mean": round(float(np.median(requests.mean(1))), 1),
        "request_us_median": round(float(np.median(np.median(requests, axis=1))), 1),
        "request_us_quiet_mean": round(float(requests.min(0).mean()), 1),
        "runs": len(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=positive, default=3, help="replays per cache")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    lives = (64, 128, 256)
    with tqdm(total=(options.runs * len(CACHES) + 3) * len(lives)) as bar:
        for live in lives:
            records += measure(live, "end", options.runs, bar)
            records += measure(live, "extra_buffer", 1, bar)
    settings = {"sglang": version(), "kv": NUM_KV_TOKENS, "slots": NUM_SLOTS}
    keep("bench_sglang", records, settings, plain_table)


if __name__ == "__main__":
    main()
