"""State machine: a reader of numbered event batches that loses some of them recovers the cache's
contents in the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hybridcache.export.mirror import EventsLost, Mirror
from hybridcache.routing.outbox import Outbox
from tests.cache.serving import hybrid
from tests.export.segments import segments_of


class OutboxMachine(RuleBasedStateMachine):
    @initialize(num_kept=st.integers(1, 4))
    def make(self, num_kept):
        self.cache = hybrid(num_kv_tokens=64, num_slots=4, grid=4)
        self.outbox = Outbox(self.cache, num_kept)
        self.mirror, self.num_requests, self.covered = Mirror(1), 0, set()

    @rule(tokens=st.lists(st.integers(0, 2), min_size=4, max_size=20), flushes=st.booleans())
    def serve(self, tokens, flushes):
        prompt = np.array(tokens, np.int32)
        self.cache.evict(len(tokens), 1)
        rows, slot = self.cache.allocate_kv(len(tokens)), self.cache.allocate_slot()
        if rows is None or slot is None:
            return
        result = self.cache.insert(prompt, rows, [(len(tokens) // 4 * 4, slot)])
        self.cache.free_kv(np.concatenate((result.duplicates, rows[result.inserted_len :])))
        for rejected in result.rejected_slots:
            self.cache.free_slot(rejected)
        self.num_requests += 1
        self.outbox.cover(self.num_requests)
        if flushes:
            self.outbox.flush()

    @rule()
    def reset(self):
        self.cache.reset()
        self.outbox.flush()

    @rule(num_lost=st.integers(0, 2))
    def read(self, num_lost):
        """Apply pending batches, but lose the first ``num_lost``: the next one must be refused."""
        batches = self.outbox.since(self.mirror.next_sequence)
        if batches is None:
            self.outbox.restart()
            self.mirror = Mirror(1)
            batches = self.outbox.since(0)
        for batch in batches[num_lost:]:
            if batch.sequence != self.mirror.next_sequence:
                with pytest.raises(EventsLost):
                    self.mirror.apply_batch(batch.sequence, batch.events)
                return
            self.mirror.apply_batch(batch.sequence, batch.events)
            self.covered.update(batch.covered)

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        self.outbox.flush()
        self.read(0)
        assert self.mirror.segments() == segments_of(self.cache._tree.nodes())


TestOutbox = OutboxMachine.TestCase


def test_batches_that_are_missing_or_dropped_are_not_returned() -> None:
    outbox = Outbox(hybrid(num_kv_tokens=64, num_slots=4, grid=4), kept=2)
    assert outbox.since(0) == [] and outbox.since(1) is None and not outbox.flush()
    for number in range(4):
        outbox.cover(number)
        assert outbox.flush()
    assert outbox.since(1) is None and [batch.sequence for batch in outbox.since(2)] == [2, 3]
    outbox.restart()
    assert [batch.sequence for batch in outbox.since(0)] == [0]
