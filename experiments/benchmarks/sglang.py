"""Compare this cache with SGLang's own, behind SGLang's interface: hits, and time per operation.

python -m experiments.benchmarks.sglang [--runs 3]

Needs SGLang 0.5.23 (`make sglang`). The requests are those of bench_tree: 2,000 conversations x 5
turns x 200-1,000 tokens, and 16 system prompts of 500 tokens. Both caches use SGLang's pools and
allocators, with 1.07 M KV tokens and 320 states.

Both get the same calls in the same order, with keys and indices in SGLang's types. The calls are
match, read the rows, lock, allocate (with eviction), insert with a state, read the rows again, move
the lock, and release it.

Runs alternate in one process. "quiet" takes the fastest of all runs for each request, which
excludes other processes. "cpu" is the thread's processor time, which includes the clocks and a
concatenation of rows.

Placement "end" saves one state at the end of each answer. "extra_buffer" is SGLang's own: a prefill
saves one at its last 64th token or at the branch that the cache reports. Decode saves one at each
256th token, and tokens after the last state are dropped. Writes results/bench_sglang.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from array import array
from time import perf_counter_ns, thread_time_ns
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.benchmarks.tree_work import Work, Workload
from experiments.provenance import RESULTS, write_json_lines
from experiments.sglang.cpu import VERSION, stand_in
from experiments.studies.common import positive, show

stand_in()

import torch  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import (  # noqa: E402
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402

from experiments.sglang.pools import CHUNK, World, new_world  # noqa: E402

VERBS = ("match", "rows", "lock", "evict", "allocate", "insert", "rows again", "unlock")
NUM_KV_TOKENS, NUM_SLOTS = 1_070_000, 320
DECODE_INTERVAL = 256
CACHES = (("rust", "lru"), ("hybridcache", "lru"), ("hybridcache", "survival"))


class Keys:
    """Token ids of one request in SGLang's form, prepared before the clock runs."""

    def __init__(self, work: Work) -> None:
        self.ids = array("q", work.everything.astype(np.int64).tobytes())
        self.prompt_len = len(work.prompt)


class Replay:
    """Replay of requests through one cache, with timed operations."""

    def __init__(self, world: World, placement: str) -> None:
        self.world = world
        self.placement = placement
        self.times: list[tuple[int, ...]] = []
        self.cpu: list[int] = []
        self.cached_tokens = self.prompt_tokens = 0

    def run(self, work: list[Keys]) -> None:
        serve = self._end if self.placement == "end" else self._extra_buffer
        for keys in work:
            serve(keys)

    def _end(self, keys: Keys) -> None:
        """Serve a request with one insert at the end of the answer, with a state there."""
        now, (cache, rows, requests) = perf_counter_ns, self.world
        ids, prompt_len = keys.ids, keys.prompt_len
        end = len(ids)
        began = thread_time_ns()
        t0 = now()
        match = cache.match_prefix(MatchPrefixParams(key=RadixKey(ids, limit=prompt_len - 1)))
        t1 = now()
        hit, node = match.device_prefix_len, match.last_device_node
        cached_rows = cache.path_device_indices(node)
        t2 = now()
        lock = cache.lock(node)
        t3 = now()
        self._make_room(end - hit)
        t4 = now()
        new, slot = rows.alloc(end - hit), requests.mamba_allocator.alloc(1)
        t5 = now()
        value = torch.cat((cached_rows[:hit], new))
        t6 = now()
        result = cache.insert(
            InsertParams(key=RadixKey(ids), value=value, mamba_value=slot, prev_prefix_len=hit)
        )
        t7 = now()
        cache.path_device_indices(result.last_device_node)
        t8 = now()
        moved = cache.lock(result.last_device_node)
        cache.unlock(lock)
        cache.unlock(moved)
        t9 = now()
        self.cpu.append(thread_time_ns() - began)
        if result.mamba_exist:
            requests.mamba_allocator.free(slot)
        self.times.append((t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4, t7 - t6, t8 - t7, t9 - t8))
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


def measure(live: int, placement: str, runs: int, bar: Any) -> list[dict[str, Any]]:
    """Run all caches on one workload, alternating, ``runs`` times."""
    work = [Keys(request) for request in Workload(live, 2000, 5)]
    replays: dict[tuple[str, str], list[Replay]] = {cache: [] for cache in CACHES}
    for _ in range(runs):
        for backend, eviction in CACHES:
            world = new_world(backend, NUM_KV_TOKENS, NUM_SLOTS, eviction=eviction)
            replay = Replay(world, placement)
            gc.collect()
            replay.run(work)
            bar.update()
            replays[backend, eviction].append(replay)
    records = []
    for (backend, eviction), done in replays.items():
        record = {
            "cache": backend,
            "eviction": eviction,
            "placement": placement,
            "live": live,
            "requests": len(work),
            "token_hit_rate": round(done[-1].cached_tokens / done[-1].prompt_tokens, 4),
        }
        records.append(record | (_times(done) if placement == "end" else {}))
    return records


def _times(replays: list[Replay]) -> dict[str, Any]:
    times = np.array([replay.times for replay in replays]) / 1e3  # [runs, requests, operations]
    requests, cpu = times.sum(2), [float(np.mean(replay.cpu)) / 1e3 for replay in replays]
    verbs = np.median(times.mean(1), axis=0)
    return {
        "request_us_mean": round(float(np.median(requests.mean(1))), 1),
        "request_us_median": round(float(np.median(np.median(requests, axis=1))), 1),
        "request_us_cpu_mean": round(statistics.median(cpu), 1),
        "request_us_quiet_mean": round(float(requests.min(0).mean()), 1),
        "verb_us_mean": {verb: round(float(us), 2) for verb, us in zip(VERBS, verbs, strict=True)},
        "runs": len(replays),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=positive, default=3, help="replays per cache")
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    lives = (64, 128, 256)
    with tqdm(total=(options.runs + 1) * len(lives) * len(CACHES)) as bar:
        for live in lives:
            records += measure(live, "end", options.runs, bar)
            records += measure(live, "extra_buffer", 1, bar)
    settings = {"sglang": VERSION, "kv": NUM_KV_TOKENS, "slots": NUM_SLOTS}
    write_json_lines(RESULTS / "bench_sglang.jsonl", records, settings)
    show(records)


if __name__ == "__main__":
    main()
