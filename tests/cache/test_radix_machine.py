"""State machine: the attention-only cache, compared with a mirror of its events."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.export.events import EventStream
from hybridcache.export.mirror import Mirror


class RadixMachine(RuleBasedStateMachine):
    """Requests that begin, publish their prompt and end. The mirror sees only stored and removed
    segments."""

    @initialize(
        page_size=st.sampled_from([1, 16]),
        grid=st.sampled_from([1, 16]),
        num_pages=st.integers(2, 40),
    )
    def make(self, page_size, grid, num_pages):
        self.step = max(page_size, grid)
        self.page_size = page_size
        self.cache = build_prefix_cache(
            CacheConfig(
                prefix_cache="radix",
                num_kv_tokens=num_pages * page_size,
                page_size=page_size,
                grid=grid,
                ghost_bytes=3_000,
            )
        )
        self.mirror = Mirror(page_size, kv_grid=self.cache.grid)
        self.cache.subscribe(EventStream(self.mirror.apply))
        self.running = []
        self.expected_rows = {}

    def prompt(self, blocks, cut):
        return np.repeat(np.array(blocks, np.int32), 5)[: 5 * len(blocks) - cut]

    def pages(self, tokens, end):
        """Return the key of the row of token ``end - 1``: all tokens up to the end of its page.

        Pages are only shared as a whole.
        """
        return end, tuple(tokens[: -(-end // self.page_size) * self.page_size].tolist())

    @rule(blocks=st.lists(st.integers(0, 2), min_size=1, max_size=12), cut=st.integers(0, 4))
    def begin(self, blocks, cut):
        tokens = self.prompt(blocks, cut)
        match = self.cache.match(tokens)
        mirrored, kv_match_len = self.mirror.match(tokens.tolist())
        assert mirrored == match.cached_len
        reachable = min(kv_match_len, len(tokens) - 1)
        assert match.kv_match_len == kv_match_len
        assert match.cached_len == reachable - reachable % self.step
        assert match.cached_len + sum(match.losses) == len(tokens)
        handle = self.cache.lock(match.node)
        self.cache.touch(match)
        rows = self.cache.gather(match.node)
        for end in range(1, match.cached_len + 1):
            assert self.expected_rows[self.pages(tokens, end)] == rows[end - 1]
        new = self.cache.allocate_kv(len(tokens) - match.cached_len)
        if new is None:
            self.cache.unlock(handle)
        else:
            self.running.append((tokens, match, handle, np.concatenate((rows, new))))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), publishes=st.booleans(), from_node=st.booleans())
    def end(self, data, publishes, from_node):
        index = data.draw(st.integers(0, len(self.running) - 1))
        tokens, match, handle, rows = self.running.pop(index)
        published = match.cached_len
        if publishes:
            result = self.cache.insert(
                tokens,
                rows[: len(tokens)],
                owned_from=published,
                after=match.node if from_node else None,
            )
            self.cache.free_kv(result.duplicates)
            published = max(published, result.inserted_len)
            for end, row in enumerate(self.cache.gather(result.node).tolist(), 1):
                self.expected_rows[self.pages(tokens, end)] = row
        self.cache.unlock(handle)
        self.cache.free_kv(rows[published:])

    @rule(num_tokens=st.integers(0, 40))
    def evict(self, num_tokens):
        free = self.cache.free_tokens
        eviction = self.cache.evict(num_tokens)
        assert eviction.num_tokens == self.cache.free_tokens - free

    @invariant()
    def invariants_hold(self):
        if hasattr(self, "cache"):
            held = sum(len(rows) - match.cached_len for _, match, _, rows in self.running)
            self.cache.check(held_tokens=held, held_slots=0)


TestRadixCache = RadixMachine.TestCase
