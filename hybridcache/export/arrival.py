"""A prefix that comes into a cache from elsewhere (another engine, host memory, a disk): its claims
while it is on its way.

What computes a prefix has a ``Lease``; what brings one has an ``Arrival``. It holds rows for the
tokens whose KV the cache does not have, and a slot for the state at the end, until ``publish``
hands both to the cache, as if they had been computed here, or ``abort`` gives them back. What the
cache has of the prefix already stays under a lock meanwhile. Nothing is counted as a use: whoever
resumes from what arrived does that.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from hybridcache.allocators.moves import Move
from hybridcache.api import PrefixCache
from hybridcache.tokens import Indices, Tokens

LABEL = "arrived"
"""Of a checkpoint that was brought, where one that is saved has the word of its placement."""


class Arrival:
    """Claims for one prefix. Made by ``begin``; not to be used after ``publish`` or ``abort``."""

    __slots__ = ("_cache", "_namespace", "_node", "_receipt", "_rows", "_tokens", "slot", "start")

    def __init__(
        self,
        cache: PrefixCache,
        tokens: Tokens,
        namespace: Hashable,
        node: Any,
        receipt: Any,
        start: int,
    ) -> None:
        """Take over ``receipt``, a lock on ``node``, whose path is ``tokens[:start]``: see
        ``begin``."""
        self._cache, self._tokens, self._namespace = cache, tokens, namespace
        self._node, self._receipt = node, receipt
        self.start = start
        """The first position whose KV must be brought."""
        self.slot: int | None = None
        """For the state at the end; None: an attention-only model."""
        self._rows: Indices = np.empty(0, np.int32)
        if cache.arena is not None:
            cache.arena.holders[self] = None

    @classmethod
    def begin(
        cls, cache: PrefixCache, tokens: Tokens, namespace: Hashable = None, *, stateful: bool
    ) -> Arrival | None:
        """Claim what is missing of ``tokens``, int32[n], n a multiple of the grid and of the page:
        rows past the KV that is there, with or without a checkpoint, and with ``stateful`` a slot.
        None: no memory; nothing is held. O(n), and what eviction takes."""
        known = min(cache.match(tokens, namespace).kv_len, len(tokens))
        known -= known % cache.page_size
        node, receipt = cache.lock_kv(tokens[:known], namespace)
        arrival = cls(cache, tokens, namespace, node, receipt, known)
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
        """Where the prefix ends, and its state is wanted."""
        return len(self._tokens)

    @property
    def rows(self) -> Indices:
        """KV row of every position in [start, end): int32, as they are now; an arena may move
        them."""
        return self._rows

    @property
    def held_tokens(self) -> int:
        """KV rows held: neither free nor the cache's."""
        return len(self._rows)

    @property
    def held_slots(self) -> int:
        return int(self.slot is not None)

    def rows_moved(self, move: Move) -> int:
        """A slab of the arena was emptied (``RowHolder``): rename what is here of its rows; how
        many are held. O(rows)."""
        return len(move.rename(self._rows))

    def publish(self) -> None:
        """All rows and the state are written: hand them to the cache. What it has meanwhile (a
        request computed the same) it keeps, and ours are free again. O(n)."""
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
            self._node,
        )
        if len(done.duplicates):
            cache.free_kv(done.duplicates)
        for slot in done.rejected_slots:
            cache.free_slot(slot)
        self._close()

    def abort(self) -> None:
        """Give everything back."""
        if len(self._rows):
            self._cache.free_kv(self._rows)
        if self.slot is not None:
            self._cache.free_slot(self.slot)
        self._close()

    def _close(self) -> None:
        if self._cache.arena is not None:
            del self._cache.arena.holders[self]
        self._cache.unlock(self._receipt)
        self._node = self._receipt = self.slot = None
        self._rows = self._rows[:0]
