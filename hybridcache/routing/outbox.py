"""A replica's side of the events: numbered batches, kept for a while so that what got lost can be
asked for again."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

from hybridcache.api import PrefixCache
from hybridcache.export.events import Event, EventStream
from hybridcache.export.mirror import EventsLost

__all__ = ["EventBatch", "EventsLost", "Outbox"]

KEPT = 256
"""Batches that can be asked for again."""


class EventBatch(NamedTuple):
    """What ``Router.on_events`` is given, without the replica."""

    sequence: int
    events: tuple[Event, ...]
    covered: tuple[Hashable, ...]


class Outbox:
    """Follows one cache. ``flush`` is called by whoever drives the cache, between its verbs; the
    other verbs from any thread.

    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=64, num_slots=2, grid=4))
    >>> outbox = Outbox(cache)
    >>> outbox.cover("request")
    >>> outbox.flush()
    True
    >>> outbox.since(0)
    [EventBatch(sequence=0, events=(), covered=('request',))]
    """

    def __init__(self, cache: PrefixCache, kept: int = KEPT) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._batches: deque[EventBatch] = deque(maxlen=kept)
        self._covered: list[Hashable] = []
        self._next_sequence = 0
        self._watch()

    def _watch(self) -> None:
        self._events: list[Event] = []
        self._stream = EventStream(self._events.append)
        self._cache.subscribe(self._stream)

    def cover(self, request: Hashable) -> None:
        """The prompt of ``request`` is computed, and what it left is told of by the next batch at
        the latest."""
        with self._lock:
            self._covered.append(request)

    def flush(self) -> bool:
        """Make a batch of what came since the last one. False: nothing did."""
        with self._lock:
            if not self._events and not self._covered:
                return False
            batch = EventBatch(self._next_sequence, tuple(self._events), tuple(self._covered))
            self._events.clear()
            self._covered.clear()
            self._batches.append(batch)
            self._next_sequence += 1
            return True

    def since(self, sequence: int) -> list[EventBatch] | None:
        """Batches from number ``sequence`` on; None: that one is no longer kept, or never was, and
        only ``restart`` helps."""
        with self._lock:
            if sequence == self._next_sequence:
                return []
            first = self._batches[0].sequence if self._batches else self._next_sequence
            if not first <= sequence < self._next_sequence:
                return None
            return [batch for batch in self._batches if batch.sequence >= sequence]

    def restart(self) -> None:
        """Begin again with batch 0, which tells of all that is cached. By whoever drives the
        cache. O(tokens cached)."""
        self._cache.unsubscribe(self._stream)
        with self._lock:
            self._batches.clear()
            self._next_sequence = 0
            self._watch()
        if not self.flush():
            with self._lock:
                self._batches.append(EventBatch(0, (), ()))
                self._next_sequence = 1
