"""State machine: event subscribers always have the contents of a hybrid or attention-only cache,
whose rows are those of the matched tokens. A reader of numbered batches that loses some of them has
the contents in the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybridcache.adapters.events import EventsLost, EventStream, Mirror, UnitTree
from hybridcache.adapters.routing.outbox import Outbox
from tests.adapters.segments import PlainMirror, segments_of
from tests.radix.serving import hybrid
from tests.refused import refused

INDEX = st.integers(0, 1000)
PREFIX_LEN = st.integers(0, 20)
SPACES = st.sampled_from((None, ("a", 1), "('a', 1)", 2**70, "\ud800"))
MORE = st.lists(st.integers(0, 2), min_size=1, max_size=9)


class EventsMachine(RuleBasedStateMachine):
    """One cache and its subscribers."""

    @initialize(
        prefix_cache=st.sampled_from(["hybrid", "hybrid", "radix"]),
        page_size=st.sampled_from([1, 3]),
        grid=st.sampled_from([1, 6]),
        num_slots=st.integers(2, 8),
        ghost_bytes=st.sampled_from([0, 3_000]),
        num_kept=st.integers(1, 4),
    )
    def make(self, page_size, grid, num_slots, ghost_bytes, num_kept, prefix_cache):
        self.is_hybrid = prefix_cache == "hybrid"
        self.options = {
            "prefix_cache": prefix_cache,
            "num_kv_tokens": 96,
            "num_slots": num_slots,
            "page_size": page_size,
            "grid": grid,
            "ghost_bytes": ghost_bytes,
        }
        self.step = max(page_size, grid)
        self.tree = UnitTree()
        self.cache = hybrid(**self.options)
        self.receipts = []
        self.prompts = {}
        self.rows = {}
        """Row of the last token of each published prefix. Pages are shared as a whole, so a prefix
        includes the rest of its page."""
        self.outbox, self.remote = Outbox(self.cache, num_kept), self.new_mirror(5)
        self.num_requests = 0
        self.subscribe()

    def new_mirror(self, number):
        return Mirror(self.step, self.is_hybrid, self.tree, number)

    def subscribe(self):
        """Create two subscribers, which first receive the current contents: a plain mirror, and one
        that shares its tree with a late reader's."""
        self.plain = PlainMirror(self.step, self.options["page_size"], self.is_hybrid)
        self.mirror = self.new_mirror(0)
        self.stream = EventStream(self.apply, self.step)
        self.cache.subscribe(self.stream)

    def apply(self, event):
        self.plain.apply(event)
        self.mirror.apply(event)

    @rule(
        prompts=st.lists(st.tuples(INDEX, PREFIX_LEN, MORE), min_size=1, max_size=6),
        namespace=SPACES,
        flushes=st.booleans(),
    )
    def requests(self, prompts, namespace, flushes):
        """Serve prompts that share a prefix with earlier ones of their namespace."""
        earlier = self.prompts.setdefault(namespace, [np.empty(0, np.int32)])
        for index, prefix_len, more in prompts:
            tokens = np.concatenate(
                [earlier[index % len(earlier)][:prefix_len], np.array(more, np.int32)]
            )
            earlier.append(tokens)
            self.serve(tokens, namespace)
            assert segments_of(self.plain.nodes.values()) == segments_of(self.cache._tree.nodes())
            self.num_requests += 1
            self.outbox.cover(self.num_requests)
            if flushes:
                self.outbox.flush()

    def rows_of(self, node, tokens, namespace):
        """Return the row of each prefix on the path to ``node``, by the prefix."""
        size, rows = self.options["page_size"], self.cache.gather(node).tolist()
        ends = (-(-end // size) * size for end in range(1, len(rows) + 1))
        keys = [(namespace, n, tokens[:end].tobytes()) for n, end in enumerate(ends)]
        return dict(zip(keys, rows, strict=True))

    def match(self, tokens, namespace):
        """Match on the cache and on its mirror."""
        match = self.cache.match(tokens, namespace)
        held = match.kv_match_len - match.kv_match_len % self.step
        assert self.plain.match(tokens, namespace) == (match.cached_len, held)
        assert self.mirror.match(tokens, namespace) == (match.cached_len, held)
        return match

    def serve(self, tokens, namespace):
        match = self.match(tokens, namespace)
        assert self.rows_of(match.node, tokens, namespace).items() <= self.rows.items()
        if not self.is_hybrid:
            reachable = min(match.kv_match_len, len(tokens) - 1)
            assert match.cached_len == reachable - reachable % self.step
        receipt = self.cache.lock(match.node)
        self.cache.touch(match)
        positions = {len(tokens) // self.step * self.step, match.seen_len // self.step * self.step}
        new = self.cache.allocate_kv(len(tokens) - match.cached_len)
        if new is not None:
            rows = np.concatenate([self.cache.gather(match.node), new])
            saved = [
                (at, self.cache.allocate_slot()) for at in sorted(positions - {0}) if self.is_hybrid
            ]
            saved = [(at, slot) for at, slot in saved if slot is not None]
            result = self.cache.insert(
                tokens, rows[: len(tokens)], saved, namespace, match.cached_len
            )
            self.rows |= self.rows_of(result.node, tokens, namespace)
            self.cache.free_kv(result.duplicates)
            self.cache.free_kv(rows[max(result.inserted_len, match.cached_len) :])
            for slot in result.rejected_slots:
                self.cache.free_slot(slot)
        self.cache.unlock(receipt)
        self.match(tokens, namespace)

    @rule(index=INDEX, namespace=SPACES)
    def lock(self, index, namespace):
        earlier = self.prompts.get(namespace, [np.empty(0, np.int32)])
        match = self.cache.match(earlier[index % len(earlier)], namespace)
        self.receipts.append(self.cache.lock(match.node))

    @precondition(lambda self: self.receipts)
    @rule(data=st.data())
    def unlock(self, data):
        index = data.draw(st.integers(0, len(self.receipts) - 1))
        self.cache.unlock(self.receipts.pop(index))

    @rule(num_tokens=st.integers(0, 60), num_slots=st.integers(0, 3))
    def evict(self, num_tokens, num_slots):
        free = self.cache.free_tokens
        eviction = self.cache.evict(num_tokens, num_slots)
        assert eviction.num_tokens == self.cache.free_tokens - free

    @rule()
    def reset(self):
        self.cache.reset()

    @rule()
    def rebuild(self):
        """Replace the cache, as after an exception in the middle of a call."""
        old, self.cache = self.cache, self.cache.rebuilt()
        for receipt in self.receipts:
            refused("this cache", self.cache.unlock, receipt)
            old.unlock(receipt)
        self.receipts = []

    @rule(num_lost=st.integers(0, 2))
    def read(self, num_lost):
        """Apply pending batches, but lose the first ``num_lost``: the next one must be refused."""
        batches = self.outbox.since(self.remote.next_sequence)
        if batches is None:
            self.outbox.restart()
            self.remote.clear()
            batches = self.outbox.since(0)
        for batch in batches[num_lost:]:
            if batch.sequence != self.remote.next_sequence:
                with pytest.raises(EventsLost):
                    self.remote.apply_batch(batch.sequence, batch.events, batch.epoch)
                return
            self.remote.apply_batch(batch.sequence, batch.events, batch.epoch)

    @rule()
    def resubscribe(self):
        self.cache.unsubscribe(self.stream)
        self.mirror.clear()
        self.subscribe()

    def teardown(self):
        if hasattr(self, "cache"):
            self.outbox.flush()
            self.read(0)
            for namespace, prompts in self.prompts.items():
                for tokens in prompts:
                    expected = self.plain.match(tokens, namespace)
                    assert self.remote.match(tokens, namespace) == expected
            self.remote.clear()
            self.mirror.clear()
            assert not self.tree.root.children

    @invariant()
    def subscribers_are_up_to_date(self):
        if hasattr(self, "cache"):
            self.cache.check(held_tokens=0, held_slots=0)
            assert segments_of(self.plain.nodes.values()) == segments_of(self.cache._tree.nodes())
            stats = self.cache.stats
            assert stats.inserted_tokens - stats.evicted_tokens == self.cache.cached_tokens
            assert stats.inserted_slots - stats.evicted_slots == self.cache.num_checkpoints
            self.mirror.check()
            self.remote.check()
            held = self.mirror.num_tokens, self.mirror.num_checkpoints
            assert held == (self.cache.cached_tokens, self.cache.num_checkpoints)


TestEvents = EventsMachine.TestCase


def test_batches_that_are_missing_or_dropped_are_not_returned() -> None:
    outbox = Outbox(hybrid(num_kv_tokens=64, num_slots=4, grid=4), kept=2)
    assert outbox.since(0) == [] and outbox.since(1) is None and not outbox.flush()
    for number in range(4):
        outbox.cover(number)
        assert outbox.flush()
    assert outbox.since(1) is None and [batch.sequence for batch in outbox.since(2)] == [2, 3]
    outbox.restart()
    assert [batch.sequence for batch in outbox.since(0)] == [0]
