"""The contract of a prefix cache: its verbs, and who owns which index at every moment.

A prefix cache keeps two resources for prefixes that may come again: *KV indices* (one per token,
rows of the full-attention layers' KV pool) and *checkpoints* (one state slot each: conv + recurrent
state of all linear layers after exactly ``position`` tokens). It stores integers only, never
tensors.

Ownership. An index or slot has, at every moment, exactly one of three owners:

- *free*: in its allocator;
- *held*: by a request, from ``allocate_kv`` / ``allocate_slot`` until it is passed to ``insert`` or
  freed;
- *cached*: by the cache, from ``insert`` until it is evicted, when the cache itself frees it to the
  allocator.

``free + cached + held == total`` for both resources is what ``check`` verifies.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hybridcache.results import Eviction, InsertResult, PrefixMatch, Resumable
from hybridcache.tokens import Indices, Tokens

if TYPE_CHECKING:
    from hybridcache.allocators.arena import ArenaAllocator
    from hybridcache.allocators.orders import Orders
    from hybridcache.listener import Listener
    from hybridcache.stats import CacheStats


class LowerMemory(Protocol):
    """The tiers below the device (``core.lower``), as their owner sees them."""

    words: tuple[str, ...]
    """The tiers that there are, the nearest first: ``host``, ``disk``."""
    row_bytes: int
    state_rows: int
    """Rows of any tier that a state takes."""
    orders: Orders
    """The copies that are still to be made."""
    copied_rows: dict[tuple[str, str], int]
    """Rows that went from one tier to another, by their words, so far."""


class PrefixCache(Protocol):
    """A prefix cache as HybridRadixCache, RadixCache, NullCache and PlainCache implement it.

    ``tokens`` is int32[n]. ``namespace`` is None, a str, bytes, an int, or a tuple of these
    (``hybridcache.namespaces``; ValueError for others): requests in different namespaces never
    share.
    """

    page_size: int
    grid: int
    stats: CacheStats
    arena: ArenaAllocator | None
    """Where rows and slots are of one memory: what tells holders of moves. None: rows never
    move."""
    lower: LowerMemory | None
    """The tiers below the device; None: what is evicted is gone."""

    @property
    def free_tokens(self) -> int:
        """KV rows available without evicting. O(1), as the next three."""
        ...

    @property
    def free_slots(self) -> int:
        """State slots available without evicting."""
        ...

    @property
    def cached_tokens(self) -> int:
        """KV rows that the cache owns."""
        ...

    @property
    def num_checkpoints(self) -> int:
        """State slots that the cache owns."""
        ...

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Read how much of ``tokens`` is cached. Changes nothing: no split, no recency. O(n).
        ValueError: not int32[n]."""
        ...

    def continuation(
        self, tokens: Tokens, max_tokens: int, namespace: Hashable = None, after: Any = None
    ) -> Tokens:
        """Up to ``max_tokens`` ids that followed ``tokens`` before, in this namespace, as far as is
        remembered (evicted KV does not matter); empty: nothing did. Changes nothing. Where several
        did, what was used last.

        ``after`` as in ``insert``: a locked node whose path begins ``tokens``. O(n less that
        node's position), a few microseconds.
        """
        ...

    def gather(self, node: Any) -> Indices:
        """KV indices from the root to the end of ``node``: int32[position]. O(position)."""
        ...

    def fetch(self, resumable: Resumable) -> bool:
        """Bring to the device what lies in lower tiers; see ``TieredRadixCache.fetch``. False: it
        is there no more, or there is no room."""
        ...

    def touch(self, match: PrefixMatch) -> None:
        """Count a use: refresh the consumed checkpoint (not the path's others) and the KV path's
        recency; record losses."""
        ...

    def lock(self, node: Any) -> Any:
        """Protect ``node``, its checkpoint and its path's KV from eviction; returns the receipt
        ``unlock`` takes. ValueError: ``node`` was evicted."""
        ...

    def lock_kv(self, tokens: Tokens, namespace: Hashable = None) -> tuple[Any, Any]:
        """Protect the cached KV of ``tokens``, whether or not a checkpoint stands at its end.

        Returns (the node that ends where the cached KV does, a receipt for ``unlock``); the node is
        None if nothing is cached. Not a use: no recency changes. O(n).
        """
        ...

    def unlock(self, receipt: Any) -> None:
        """Undo the ``lock`` that gave ``receipt``, which is void from then on. O(1). ValueError:
        another cache gave it."""
        ...

    def insert(
        self,
        tokens: Tokens,
        kv_indices: Indices,
        checkpoints: Sequence[tuple[int, int]] = (),
        namespace: Hashable = None,
        owned_from: int = 0,
        labels: Sequence[str] = (),
        after: Any = None,
    ) -> InsertResult:
        """Publish ``tokens`` with their KV rows, int32[n] each, and checkpoints [(position, slot),
        ...].

        ``kv_indices[:owned_from]`` are the tree's own (the caller holds a lock over them); the rest
        the caller holds, and ownership of whatever is not in ``duplicates`` or past
        ``inserted_len`` passes to the cache; likewise slots not in ``rejected_slots``. ``labels``
        are the placement words that asked for the checkpoints, one each (or none). ``after`` is a
        locked node whose path is ``tokens[:owned_from]`` (``match.node``, later ``result.node``):
        the walk then starts there, O(n - owned_from) instead of O(n).

        ValueError, and nothing changed: arrays that are not int32[n], fewer tokens in the tree than
        ``owned_from``, an ``after`` that is evicted or not locked, malformed checkpoints or labels,
        a namespace that does not equal itself. Not checked, because it would cost a pass: that rows
        and slots are the caller's, that those below ``owned_from`` are the tree's, that ``after``
        is of these tokens and this namespace. ``check`` finds rows and slots that are in two hands.
        """
        ...

    def allocate_kv(self, num_tokens: int) -> Indices | None:
        """Take rows for ``num_tokens`` tokens (whole pages), evicting as needed; None if that many
        are not available."""
        ...

    def allocate_slot(self) -> int | None:
        """Take one state slot, evicting as needed; None if none is available."""
        ...

    def free_kv(self, kv_indices: Indices) -> None:
        """Give rows back that the caller holds: taken by ``allocate_kv`` and never passed on.
        O(rows)."""
        ...

    def free_slot(self, slot: int) -> None:
        """Give a slot back that the caller holds. O(1)."""
        ...

    def evict(self, num_tokens: int = 0, num_slots: int = 0) -> Eviction:
        """Evict until that much was freed or nothing evictable is left. O(log n) per item."""
        ...

    def reset(self) -> None:
        """Drop everything that is not locked."""
        ...

    def subscribe(self, listener: Listener) -> None:
        """Notify ``listener``, beside those subscribed already, of all that is cached and of every
        change from now on. O(cache)."""
        ...

    def unsubscribe(self, listener: Listener) -> None:
        """Notify ``listener`` of nothing more."""
        ...

    def render(self, form: str = "text", max_nodes: int = 1000) -> str:
        """A picture of what is cached: ``text``, ``graphviz`` or ``svg``. O(nodes drawn)."""
        ...

    def check(self, held_tokens: int | None = None, held_slots: int | None = None) -> None:
        """Recompute every invariant from scratch; AssertionError names the first that fails. With
        ``held_*`` also ``free + cached + held == total``. O(tree)."""
        ...
