"""Reservation for a prefix that is copied into the cache from another engine.

A ``Lease`` belongs to a computed prefix, a ``ReceivedPrefix`` to a copied one. It holds rows for
the tokens without KV in the cache, and a slot for the state at the end. ``publish`` moves both into
the cache as if they had been computed here; ``abort`` frees them. The cached part of the prefix is
locked meanwhile. Its arrival does not count as a use of the prefix; resuming from it does.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from hybridcache.allocators.moves import Move
from hybridcache.cache import HybridRadixCache, LockHandle
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.tokens import EMPTY, Indices, Tokens

LABEL = "arrived"
"""Label of a copied checkpoint, in place of the placement rule's label."""


class ReceivedPrefix:
    """Reservation for one prefix. Create with ``begin``; unusable after ``publish`` or
    ``abort``."""

    __slots__ = ("_cache", "_namespace", "_node", "_receipt", "_rows", "_tokens", "slot", "start")

    def __init__(
        self,
        cache: HybridRadixCache,
        tokens: Tokens,
        namespace: Hashable,
        receipt: LockHandle,
        start: int,
    ) -> None:
        """Take over ``receipt``, a lock on the path ``tokens[:start]``. See ``begin``."""
        self._cache, self._tokens, self._namespace = cache, tokens, namespace
        self._receipt = receipt
        self.start = start
        """First position without KV in the cache."""
        self.slot: int | None = None
        """Slot for the state at the end, or None for an attention-only model."""
        self._rows: Indices = EMPTY
        if cache.arena is not None:
            cache.arena.holders[self] = None

    @classmethod
    def begin(
        cls, cache: HybridRadixCache, tokens: Tokens, namespace: Hashable = None, *, stateful: bool
    ) -> ReceivedPrefix | None:
        """Reserve rows, and with ``stateful`` a slot, for the missing part of a prefix.

        Args:
            cache: The cache.
            tokens: int32[n]; n is a multiple of the grid and of the page size.
            namespace: Namespace of the prefix.
            stateful: True to reserve a slot for the state at the end.

        Returns:
            The reservation, or None if there is not enough memory (nothing is held then).

        O(n), plus evictions.
        """
        known = min(cache.match(tokens, namespace).kv_match_len, len(tokens))
        known -= known % cache.page_size
        arrival = cls(cache, tokens, namespace, cache.lock_kv(tokens[:known], namespace), known)
        if not arrival._claim(stateful):
            arrival.abort()
            return None
        return arrival

    def _claim(self, stateful: bool) -> bool:
        if stateful:
            self.slot = self._cache.allocate_slot()
        if stateful and self.slot is None:
            return False
        rows = self._cache.allocate_kv(len(self._tokens) - self.start)
        if rows is None:
            return False
        self._rows = rows
        return True

    @property
    def end(self) -> int:
        """Length of the prefix, and position of its state."""
        return len(self._tokens)

    @property
    def rows(self) -> Indices:
        """KV row of each position in [start, end): int32. An arena can move them."""
        return self._rows

    @property
    def held_tokens(self) -> int:
        """Number of KV rows held, neither free nor cached."""
        return len(self._rows)

    @property
    def held_slots(self) -> int:
        return int(self.slot is not None)

    def rows_moved(self, move: Move) -> int:
        """Rename rows after a slab of the arena was emptied (``RowHolder``). O(rows).

        Returns the number of rows held in that slab.
        """
        return len(move.rename(self._rows))

    def publish(self) -> None:
        """Move the written rows and state into the cache. O(n).

        Parts that another request has published meanwhile are kept; our duplicates are freed.
        """
        cache = self._cache
        rows = np.concatenate([np.zeros(self.start, np.int32), self._rows])
        saved = () if self.slot is None else ((self.end, self.slot),)
        done = cache.insert(
            self._tokens,
            rows,
            saved,
            self._namespace,
            self.start,
            (LABEL,) * len(saved),
            self._receipt.node,
        )
        if len(done.duplicates):
            cache.free_kv(done.duplicates)
        for slot in done.rejected_slots:
            cache.free_slot(slot)
        self._close()

    def abort(self) -> None:
        """Free all rows and the slot."""
        if len(self._rows):
            self._cache.free_kv(self._rows)
        if self.slot is not None:
            self._cache.free_slot(self.slot)
        self._close()

    def _close(self) -> None:
        if self._cache.arena is not None:
            del self._cache.arena.holders[self]
        self._cache.unlock(self._receipt)
        self.slot = None
        self._rows = self._rows[:0]


def begin_arrival(
    manager: CacheManager, tokens: Tokens, namespace: Hashable
) -> ReceivedPrefix | None:
    """Allocate memory for the missing part of ``tokens``, in whole grid steps; see
    ``ReceivedPrefix.begin``. Must be followed by ``end_arrival``."""
    arrival = ReceivedPrefix.begin(manager.cache, tokens, namespace, stateful=manager.stateful)
    if arrival is not None:
        manager.other_holders[arrival] = None
    return arrival


def end_arrival(manager: CacheManager, arrival: ReceivedPrefix, *, is_whole: bool) -> None:
    """Publish the received entries, or free their memory if they are incomplete."""
    del manager.other_holders[arrival]
    if is_whole:
        with manager.publishing():
            arrival.publish()
    else:
        arrival.abort()
