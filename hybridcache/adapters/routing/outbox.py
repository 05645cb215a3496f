"""Sender of a replica's cache events: numbered batches, stored for a while for retransmission."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Hashable
from math import lcm
from typing import NamedTuple

from hybridcache.adapters.events import Event, EventStream
from hybridcache.radix.cache import HybridRadixCache

KEPT = 256
"""Number of stored batches."""


class EventBatch(NamedTuple):
    """Arguments of ``Router.on_events``, without the replica."""

    sequence: int
    events: tuple[Event, ...]
    covered: tuple[Hashable, ...]
    epoch: int = 0
    """Random number of the numbering: a sender that starts again has another."""


class Outbox:
    """Event batches of one cache, for one reader.

    ``flush`` and ``restart`` must be called by the thread that drives the cache, between cache
    operations. The other methods can be called from any thread.

    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> from hybridcache.adapters.routing.outbox import Outbox
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=64, num_slots=2, grid=4))
    >>> outbox = Outbox(cache)
    >>> outbox.epoch = 7  # Random otherwise.
    >>> outbox.cover("request")
    >>> outbox.flush()
    EventBatch(sequence=0, events=(), covered=('request',), epoch=7)
    >>> outbox.since(1)
    []
    """

    def __init__(self, cache: HybridRadixCache, kept: int = KEPT) -> None:
        self._lock = threading.Lock()
        self._batches: deque[EventBatch] = deque(maxlen=kept)
        self._covered: list[Hashable] = []
        self._next_sequence = 0
        self.epoch = secrets.randbits(63)
        self._watch(cache)

    def _watch(self, cache: HybridRadixCache) -> None:
        self._events: list[Event] = []
        self._stream = EventStream(self._events.append, lcm(cache.grid, cache.page_size))
        cache.subscribe(self._stream)

    def cover(self, request: Hashable) -> None:
        """Record that the prompt of ``request`` is computed, so that the next batch covers it."""
        with self._lock:
            self._covered.append(request)

    def flush(self, even_if_empty: bool = False) -> EventBatch | None:
        """Return a new batch of the changes since the last one, or None if there were none."""
        with self._lock:
            if not self._events and not self._covered and not even_if_empty:
                return None
            events, covered = tuple(self._events), tuple(self._covered)
            batch = EventBatch(self._next_sequence, events, covered, self.epoch)
            self._events.clear()
            self._covered.clear()
            self._batches.append(batch)
            self._next_sequence += 1
            return batch

    def since(self, sequence: int) -> list[EventBatch] | None:
        """Return the batches from number ``sequence`` on. None if that batch is no longer stored or
        never existed: call ``restart``."""
        with self._lock:
            if sequence == self._next_sequence:
                return []
            first = self._batches[0].sequence if self._batches else self._next_sequence
            if not first <= sequence < self._next_sequence:
                return None
            return [batch for batch in self._batches if batch.sequence >= sequence]

    def restart(self) -> None:
        """Start again with a batch 0 that describes the whole cache. O(tokens cached)."""
        cache = self._stream.followed  # ``rebuilt`` may have replaced the first one.
        assert isinstance(cache, HybridRadixCache), "the stream has ended: make a new outbox"
        cache.unsubscribe(self._stream)
        with self._lock:
            self._batches.clear()
            self._next_sequence, self.epoch = 0, secrets.randbits(63)
            self._watch(cache)
        self.flush(even_if_empty=True)
