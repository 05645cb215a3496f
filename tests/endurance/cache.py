"""Random operations on caches of all page sizes, grids, budgets, tiers and policies.

Requests begin, load from host memory and disk, publish in parts with checkpoints, finish, abort and
fail to get memory. They come in any order, over prompts with shared prefixes. Meanwhile rows and
slots are held and freed, items evicted, and caches reset.

For a part of the caches without tiers, a model without a tree stores the prefix that was written to
each row and slot. The rows of every match, and its state, must have exactly the prefixes of the
prompt. ``tests/cache/tiers.py`` models the contents of tiers.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.allocators.moves import Move
from hybridcache.config import MEMORIES
from hybridcache.policies.registry import EVICTION
from hybridcache.tokens import Tokens

OPERATIONS_OF_A_CACHE = 100_000
MAX_RUNNING = 8
NAMESPACES = (None, "tenant", ("model", 3), 7, b"x", (None,))


def prefixes(tokens: Tokens, namespace: Any) -> list[int]:
    """Return a hash of each prefix of a prompt, from one token to all."""
    found, value = [], hash((namespace, "root"))
    for token in tokens.tolist():
        value = hash((value, token))
        found.append(value)
    return found


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
        kind = {7: "radix", 15: "none"}.get(number % 16, "hybrid")
        least = pools["state_bytes"] + page_size * pools.get("kv_bytes_per_token", 1)
        tiers = {
            name: least + rng.randint(0, 80) * unit
            for name in ("host_bytes", "disk_bytes")
            if kind == "hybrid" and rng.random() < 0.4
        }
        yield CacheConfig(
            prefix_cache=kind,
            page_size=page_size,
            grid=grid,
            eviction="lru" if number % 2 else rng.choice(sorted(EVICTION)),
            priority_classes=rng.random() < 0.8,
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

    def __init__(self, config: CacheConfig, rng: random.Random, is_compared: bool) -> None:
        self.config, self.rng = config, rng
        self.cache: Any = build_prefix_cache(config)
        if self.cache.arena is not None:
            self.cache.arena.holders[self] = None
        self.unit = max(config.page_size, config.grid)
        self.is_compared = is_compared and not (config.host_bytes or config.disk_bytes)
        """True if the contents of rows and slots are compared."""
        self.contents: dict[int, int] = {}
        """Prefix of each written row."""
        self.states: dict[int, int] = {}
        """Prefix of the state in each written slot."""
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
        moved = [self.contents.get(row, 0) for row in move.src.tolist()]
        self.contents.update(zip(move.dst.tolist(), moved, strict=True))
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
        self.compare(tokens, namespace, match)
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
        rows = np.concatenate((cache.gather(match.node), new))
        if self.is_compared:
            written = prefixes(tokens, namespace)[match.cached_len :]
            self.contents.update(zip(new.tolist(), written, strict=False))
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
                position = rng.randint(0, length // self.unit) * self.unit
                offered.append((position, slot))
                if self.is_compared and position:
                    self.states[slot] = prefixes(request.tokens[:position], request.namespace)[-1]
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

    def compare(self, tokens: Tokens, namespace: Any, match: Any) -> None:
        """Check that the rows and the state of a match have the prefixes of the prompt."""
        rows = self.cache.gather(match.node)
        assert len(rows) == match.cached_len, "rows and hit differ in length"
        if self.is_compared:
            expected = prefixes(tokens[: len(rows)], namespace)
            assert [self.contents[row] for row in rows.tolist()] == expected, "a wrong row"
            if match.checkpoint is not None:
                found = self.states[match.checkpoint]
                assert found == expected[-1], "a state of another prefix"

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
        assert self.config.prefix_cache == "none" or self.cache.num_nodes == 0, "nodes are left"


def run(seed: int, num_operations: int) -> dict[str, int]:
    """Run ``num_operations``. Returns the counts of events.

    The first caches are checked after every step, later ones a thousand times each.
    """
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with tqdm(total=num_operations, unit="op", unit_scale=True, leave=False) as bar:
        for config in configs(rng):
            is_small = counts["caches"] < 16
            stress = Stress(config, rng, is_small or counts["caches"] % 8 == 0)
            share = 1000 if is_small else max(OPERATIONS_OF_A_CACHE, num_operations // 64)
            share = min(share, num_operations - counts["operations"])
            check_every = 1 if is_small else share // 1000
            next_check = 0
            while stress.operations < share:
                before = stress.operations
                stress.step()
                bar.update(stress.operations - before)
                if stress.operations >= next_check:
                    stress.check()
                    counts["checks"] += 1
                    next_check = stress.operations + check_every
            stress.close()
            counts["caches"] += 1
            for name in ("operations", "hits", "fetches", "refusals"):
                counts[name] += getattr(stress, name)
            counts["evictions"] += stress.cache.stats.evictions
            if stress.cache.arena is not None:
                counts["moves"] += stress.cache.arena.num_moves
            if counts["operations"] >= num_operations:
                break
    return dict(counts)
