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
from hybridcache.tokens import EMPTY, Indices, Tokens

LABEL = "arrived"
"""Label of a copied checkpoint, in place of the placement rule's label."""


class ReceivedPrefix:
    """Reservation for one prefix. Create with ``begin``; unusable after ``publish`` or
    ``abort``."""

    __slots__ = ("_cache", "_namespace", "_node", "_receipt", "_tokens", "rows", "slot", "start")

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
        self.rows: Indices = EMPTY
        """KV row of each position in [start, end): int32. An arena can move them."""
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
        if stateful:
            arrival.slot = cache.allocate_slot()
        has_slot = not stateful or arrival.slot is not None
        rows = cache.allocate_kv(len(tokens) - known) if has_slot else None
        if rows is None:
            arrival.abort()
            return None
        arrival.rows = rows
        return arrival

    @property
    def end(self) -> int:
        """Length of the prefix, and position of its state."""
        return len(self._tokens)

    @property
    def held_tokens(self) -> int:
        """Number of KV rows held, neither free nor cached."""
        return len(self.rows)

    @property
    def held_slots(self) -> int:
        return int(self.slot is not None)

    def rows_moved(self, move: Move) -> int:
        """Rename rows after a slab of the arena was emptied (``RowHolder``). O(rows).

        Returns the number of rows held in that slab.
        """
        return len(move.rename(self.rows))

    def publish(self) -> None:
        """Move the written rows and state into the cache. O(n).

        Parts that another request has published meanwhile are kept; our duplicates are freed.
        """
        cache = self._cache
        rows = np.concatenate([np.zeros(self.start, np.int32), self.rows])
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
        if len(self.rows):
            self._cache.free_kv(self.rows)
        if self.slot is not None:
            self._cache.free_slot(self.slot)
        self._close()

    def _close(self) -> None:
        if self._cache.arena is not None:
            del self._cache.arena.holders[self]
        self._cache.unlock(self._receipt)
        self.slot = None
        self.rows = EMPTY
