"""Random requests on a cache, compared with a model without a tree.

The model stores the prefix that was written to each row and slot. Every match is read back: each
row must contain its token's prefix, and the slot the state of exactly the hit. A request only
writes rows and slots that it allocated. The driver counts held memory itself and passes it to
``check``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Hashable
from typing import Any

import numpy as np

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.api import PrefixCache
from hybridcache.policies.registry import EVICTION

NAMESPACES: tuple[Hashable, ...] = (None, "a", ("a", 1), 7, b"x", (None,))


def prefixes(tokens: list[int], namespace: Hashable) -> list[int]:
    """Return a hash of each prefix of a prompt, from one token to all."""
    found, value = [], hash((namespace, "root"))
    for token in tokens:
        value = hash((value, token))
        found.append(value)
    return found


class Driver:
    """Random requests on one cache, up to four at a time, each with a lock and its rows."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        page_size = draw.choice((1, 1, 4, 16))
        self.step = page_size * draw.choice((1, 2, 6))
        self.cache: PrefixCache = build_prefix_cache(
            CacheConfig(
                prefix_cache=draw.choice(("hybrid", "hybrid", "hybrid", "radix")),
                num_kv_tokens=page_size * draw.choice((8, 40, 200)),
                num_slots=draw.choice((0, 1, 5, 20)),
                grid=self.step,
                page_size=page_size,
                kv_bytes_per_token=1,
                state_bytes=20,
                eviction=draw.choice(sorted(EVICTION)),
                ghost_bytes=draw.choice((0, 1500, 10**6)),
            )
        )
        self.page_size = page_size
        self.row: dict[int, int] = {}
        self.slot: dict[int, int] = {}
        self.held_rows = self.held_slots = 0
        self.open: list[tuple[Any, ...]] = []
        self.prompts = [[draw.randrange(3) for _ in range(draw.randrange(1, 80))] for _ in range(6)]
        self.num_operations = self.num_hits = 0

    def play(self, num_operations: int) -> None:
        for _ in range(num_operations):
            self.num_operations += 1
            roll = self.draw.random()
            if roll < 0.55 and len(self.open) < 4:
                self.begin()
            elif roll < 0.93 and self.open:
                self.finish(self.open.pop(self.draw.randrange(len(self.open))))
            elif roll < 0.97:
                self.cache.evict(self.draw.randrange(40), self.draw.randrange(3))
            elif roll < 0.98:
                self.cache.reset()
            if self.draw.random() < 0.1:
                self.cache.check(held_tokens=self.held_rows, held_slots=self.held_slots)
        while self.open:
            self.finish(self.open.pop())
        self.cache.check(held_tokens=0, held_slots=0)

    def begin(self) -> None:
        """Start a request: match, read back the hit, lock, and allocate rows and slots for the
        rest."""
        draw, cache = self.draw, self.cache
        before = draw.choice(self.prompts)
        tokens = before[: draw.choice((len(before), draw.randrange(len(before) + 1)))]
        tokens = tokens + [draw.randrange(3) for _ in range(draw.randrange(1, 40))]
        self.prompts[draw.randrange(6)] = tokens
        namespace = draw.choice(NAMESPACES)
        array = np.array(tokens, np.int32)
        match = cache.match(array, namespace)
        truth = prefixes(tokens, namespace)
        cached_len = match.cached_len
        assert 0 <= cached_len < len(tokens) and cached_len % self.step == 0
        assert cached_len + sum(match.losses) == len(tokens), "a token without a loss cause"
        rows = cache.gather(match.node)[:cached_len].tolist()
        assert [self.row[row] for row in rows] == truth[:cached_len], "a row of another prefix"
        if cached_len and match.checkpoint is not None:
            assert self.slot[match.checkpoint] == truth[cached_len - 1], "a state of another prefix"
        self.num_hits += cached_len > 0
        receipt = cache.lock(match.node)
        cache.touch(match)
        fresh = cache.allocate_kv(len(tokens) - cached_len)
        if fresh is None:
            cache.unlock(receipt)
            return
        self.held_rows += len(fresh)
        for row, value in zip(fresh.tolist(), truth[cached_len:], strict=False):
            self.row[row] = value
        states = []
        for _ in range(draw.randrange(3)):
            at = draw.choice((len(tokens), draw.randrange(cached_len + 1, len(tokens) + 1)))
            at -= draw.choice((0, at % self.step))
            if at > cached_len and (slot := cache.allocate_slot()) is not None:
                self.held_slots += 1
                self.slot[slot] = truth[at - 1]
                states.append((at, slot))
        self.open.append((array, namespace, match, receipt, rows, fresh, states, truth))

    def finish(self, request: tuple[Any, ...]) -> None:
        """Publish all, half or nothing of a request, and free memory that the cache did not
        take."""
        array, namespace, match, receipt, rows, fresh, states, truth = request
        cache, draw = self.cache, self.draw
        all_rows = np.concatenate([np.array(rows, np.int32), fresh])
        length = draw.choice((len(array), len(array), draw.randrange(len(array) + 1), 0))
        length = max(length, match.cached_len)
        owned, left = match.cached_len, {slot for _, slot in states}
        if length > owned:
            offered = [(at, slot) for at, slot in states if at <= length]
            result = cache.insert(array[:length], all_rows[:length], offered, namespace, owned)
            if len(result.duplicates):
                cache.free_kv(result.duplicates)
                self.held_rows -= len(result.duplicates)
            taken = max(result.inserted_len - owned, 0) - len(result.duplicates)
            self.held_rows -= taken
            self.held_slots -= len(offered) - len(result.rejected_slots)
            left -= {slot for _, slot in offered} - set(result.rejected_slots)
            owned = max(result.inserted_len, owned)
            now = cache.gather(result.node)[: result.inserted_len].tolist()
            assert [self.row[row] for row in now] == truth[: result.inserted_len], "a wrong row"
        rest = all_rows[owned:]
        if len(rest):
            cache.free_kv(rest)
            self.held_rows -= len(rest)
        for slot in left:
            cache.free_slot(slot)
            self.held_slots -= 1
        cache.unlock(receipt)


def attack(seed: int, seconds: float) -> dict[str, int]:
    """Test caches of random settings until the time is up. An AssertionError contains the seed."""
    deadline, runs, operations, hits = time.monotonic() + seconds, 0, 0, 0
    while time.monotonic() < deadline:
        driver = Driver(seed + runs)
        try:
            driver.play(400)
        except Exception as error:
            raise AssertionError(f"cache, seed {seed + runs}: {error!r}") from error
        runs += 1
        operations += driver.num_operations
        hits += driver.num_hits
    return {"caches": runs, "operations": operations, "hits read back": hits}
