"""Run ten million random operations on the cache, and check its invariants (`make stress`).

python -m experiments.system.stress_tree [--operations 10000000] [--seed 0] [--check-every 20000]

Caches of all page sizes, grids, budgets, tiers and policies run one after another. Requests begin,
load from host memory and disk, publish in parts with checkpoints, finish, abort and fail to get
memory. They come in any order, over prompts with shared prefixes. Meanwhile rows and slots are held
and freed, items evicted, and caches reset.

An operation is one call of a cache's method. ``check()`` with full conservation runs every
``--check-every`` operations and at each cache's end. A smaller run checks after every operation.
The last printed line is meant for the CHANGELOG.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.provenance import RESULTS, write_json_lines
from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.allocators.moves import Move
from hybridcache.config import MEMORIES
from hybridcache.policies.registry import EVICTION
from hybridcache.tokens import Tokens

EVERY_STEP_SHARE = 200
"""Divisor of the number of operations for the run that checks after each one."""
MAX_RUNNING = 8
NAMESPACES = (None, "tenant", ("model", 3))


def configs(rng: random.Random) -> Iterator[CacheConfig]:
    """Yield configurations without end: all page sizes and grids in turn, other settings drawn.

    Every second one has the default LRU.
    """
    for number, (page_size, grid) in enumerate(
        itertools.cycle(itertools.product((1, 16, 64, 256), repeat=2))
    ):
        unit = max(page_size, grid)
        pools: dict[str, Any] = {
            "num_kv_tokens": unit * rng.randint(8, 60),
            "num_slots": rng.randint(1, 20),
            "state_bytes": 2,
        }
        if rng.random() < 0.5:
            state_bytes = unit * rng.randint(1, 8)
            pools = {
                "total_bytes": 2 * unit * rng.randint(8, 60) + 4 * state_bytes,
                "kv_bytes_per_token": 2,
                "state_bytes": state_bytes,
                "memory": rng.choice(MEMORIES),
            }
        is_hybrid = number % 8 != 7
        least = pools["state_bytes"] + page_size * pools.get("kv_bytes_per_token", 1)
        tiers = {
            name: least + rng.randint(0, 80) * unit
            for name in ("host_bytes", "disk_bytes")
            if is_hybrid and rng.random() < 0.4
        }
        yield CacheConfig(
            prefix_cache="hybrid" if is_hybrid else "radix",
            page_size=page_size,
            grid=grid,
            eviction="lru" if number % 2 else rng.choice(sorted(EVICTION)),
            dead_first=rng.random() < 0.8,
            demote_superseded=rng.random() < 0.8,
            ghost_bytes=rng.choice((0, 5_000, 1 << 20)),
            **pools,
            **tiers,
        )


class Running:
    """Request in flight with its rows and lock."""

    __slots__ = ("namespace", "node", "published_len", "receipt", "rows", "tokens")

    def __init__(self, tokens: Tokens, namespace: Any, match: Any, receipt: Any, rows: Any):
        self.tokens, self.namespace = tokens, namespace
        self.receipt, self.rows = receipt, rows
        self.published_len: int = match.cached_len
        self.node = match.node


class Stress:
    """One cache under random operations."""

    def __init__(self, config: CacheConfig, rng: random.Random) -> None:
        self.config, self.rng = config, rng
        self.cache: Any = build_prefix_cache(config)
        if self.cache.arena is not None:
            self.cache.arena.holders[self] = None
        self.unit = max(config.page_size, config.grid)
        self.running: list[Running] = []
        self.rows: list[Any] = []
        self.slots: list[int] = []
        self.seen: list[Tokens] = [np.empty(0, np.int32)]
        self.operations = 0
        self.hits = 0
        self.fetches = 0
        self.refusals = 0

    def rows_moved(self, move: Move) -> int:
        """Rename held rows and slots after a move in an arena."""
        held = sum(len(move.rename(rows)) for rows in self.rows)
        for request in self.running:
            positions = move.rename(request.rows)
            held += int((positions >= request.published_len).sum())
        return held

    def prompt(self) -> Tokens:
        """Return a random prefix of an earlier prompt, followed by a few blocks."""
        rng, unit = self.rng, self.unit
        before = rng.choice(self.seen)
        prefix = before[: rng.randint(0, len(before))]
        size = rng.choice((1, unit, unit + 1))
        blocks = [rng.choice((0, 1, 2**31 - 1)) for _ in range(rng.randint(1, 5))]
        tokens = np.concatenate((prefix, np.repeat(np.array(blocks, np.int32), size)))[: 10 * unit]
        if len(self.seen) < 40:
            self.seen.append(tokens)
        else:
            self.seen[rng.randrange(40)] = tokens
        return tokens

    def step(self) -> None:
        """Do one random action."""
        self.cache.take_step().done()
        dice = self.rng.random()
        if dice < 0.30 and len(self.running) < MAX_RUNNING:
            self.begin()
        elif dice < 0.60 and self.running:
            self.publish(self.rng.choice(self.running))
        elif dice < 0.85 and self.running:
            self.end(self.running.pop(self.rng.randrange(len(self.running))))
        elif dice < 0.90:
            self.cache.evict(self.rng.randint(0, 3 * self.unit), self.rng.randint(0, 2))
            self.operations += 1
        elif dice < 0.94:
            self.hold()
        elif dice < 0.9999:
            self.release()
        else:
            self.cache.reset()
            self.operations += 1

    def begin(self) -> None:
        cache, tokens = self.cache, self.prompt()
        namespace = self.rng.choice(NAMESPACES)
        match = cache.match(tokens, namespace)
        assert match.cached_len + sum(match.losses) == len(tokens), "losses do not sum up"
        if match.loadable and self.rng.random() < 0.7:
            match = self.fetch(tokens, match)
        receipt = cache.lock(match.node)
        cache.touch(match)
        new = cache.allocate_kv(len(tokens) - match.cached_len)
        self.operations += 4
        self.hits += match.cached_len > 0
        if new is None:
            self.refusals += 1
            cache.unlock(receipt)
            self.operations += 1
            return
        cached = cache.gather(match.node)
        assert len(cached) == match.cached_len, "rows and hit differ in length"
        rows = np.concatenate((cached, new))
        self.operations += 1
        self.running.append(Running(tokens, namespace, match, receipt, rows))

    def fetch(self, tokens: Tokens, match: Any) -> Any:
        """Load a random offloaded prefix of the match. Returns the new match."""
        cache, candidate = self.cache, self.rng.choice(match.loadable)
        is_loaded = cache.fetch(candidate)
        found = cache.match(tokens, match.namespace)
        assert not is_loaded or found.cached_len >= candidate.position, "a loaded prefix is missing"
        self.fetches += is_loaded
        self.refusals += not is_loaded
        self.operations += 2
        return found

    def publish(self, request: Running) -> None:
        cache, rng = self.cache, self.rng
        length = rng.randint(request.published_len, len(request.tokens))
        offered = []
        for _ in range(rng.randint(0, 2)):
            slot = cache.allocate_slot()
            if slot is not None:
                offered.append((rng.randint(0, length // self.unit) * self.unit, slot))
        result = cache.insert(
            request.tokens[:length],
            request.rows[:length],
            offered,
            request.namespace,
            request.published_len,
            after=request.node if rng.random() < 0.5 else None,
        )
        for slot in result.rejected_slots:
            cache.free_slot(slot)
        moved = cache.lock(result.node)
        cache.unlock(request.receipt)
        cache.free_kv(result.duplicates)
        rows = cache.gather(result.node)
        request.rows[: len(rows)] = rows
        request.receipt, request.node = moved, result.node
        request.published_len = max(result.inserted_len, 0)
        self.operations += 5 + len(offered) + len(result.rejected_slots)

    def end(self, request: Running) -> None:
        self.cache.free_kv(request.rows[request.published_len :])
        self.cache.unlock(request.receipt)
        self.operations += 2

    def hold(self) -> None:
        rows = self.cache.allocate_kv(self.rng.randint(1, 4) * self.config.page_size)
        if rows is not None:
            self.rows.append(rows)
        slot = self.cache.allocate_slot()
        if slot is not None:
            self.slots.append(slot)
        self.operations += 2

    def release(self) -> None:
        while self.rows:
            self.cache.free_kv(self.rows.pop())
            self.operations += 1
        while self.slots:
            self.cache.free_slot(self.slots.pop())
            self.operations += 1

    def check(self) -> None:
        held = sum(len(request.rows) - request.published_len for request in self.running)
        self.cache.check(held_tokens=held + sum(map(len, self.rows)), held_slots=len(self.slots))

    def close(self) -> None:
        """Free everything, and check that nothing is left."""
        while self.running:
            self.end(self.running.pop())
        self.release()
        self.check()
        self.cache.reset()
        self.check()
        assert self.cache.num_nodes == 0, "nodes are left"


def stress(seed: int, num_operations: int, check_every: int) -> dict[str, int]:
    """Run ``num_operations`` and return the counts of events. Raises AssertionError on a
    violation."""
    rng = random.Random(seed)
    names = ("operations", "checks", "caches", "hits", "fetches", "refusals", "evictions", "moves")
    counts = dict.fromkeys(names, 0)
    with tqdm(total=num_operations, unit="op", unit_scale=True) as bar:
        for config in configs(rng):
            run = Stress(config, rng)
            share = min(max(num_operations // 64, 1000), num_operations - counts["operations"])
            next_check = check_every
            while run.operations < share:
                before = run.operations
                run.step()
                bar.update(run.operations - before)
                if run.operations >= next_check:
                    run.check()
                    counts["checks"] += 1
                    next_check = run.operations + check_every
            run.close()
            counts["operations"] += run.operations
            counts["checks"] += 2
            counts["caches"] += 1
            counts["hits"] += run.hits
            counts["fetches"] += run.fetches
            counts["refusals"] += run.refusals
            counts["evictions"] += run.cache.stats.evictions
            if run.cache.arena is not None:
                counts["moves"] += run.cache.arena.num_moves
            if counts["operations"] >= num_operations:
                return counts
    raise AssertionError("configs never end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check-every", type=int, default=20_000, help="operations")
    options = parser.parse_args()
    records = []
    for operations, every in (
        (options.operations // EVERY_STEP_SHARE, 1),
        (options.operations, options.check_every),
    ):
        begin = time.monotonic()
        counts = stress(options.seed, operations, every)
        seconds = round(time.monotonic() - begin, 1)
        records.append({"seed": options.seed, "check_every": every, "seconds": seconds} | counts)
    write_json_lines(RESULTS / "stress_tree.jsonl", records)
    small, large = records
    print(
        f"stress: seed {options.seed}: {large['operations']:,} operations on {large['caches']} "
        f"caches in {large['seconds']} s, {large['checks']:,} full checks, "
        f"{large['evictions']:,} evictions, {large['fetches']:,} loads from tiers, "
        f"{large['refusals']:,} refusals, {large['moves']:,} slabs moved; "
        f"{small['operations']:,} more with a check after every step: no violation"
    )


if __name__ == "__main__":
    main()
