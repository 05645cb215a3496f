"""The contract of a prefix cache: seven verbs, and who owns which index at every moment.

A prefix cache keeps two resources for prefixes that may come again: *KV indices* (one per token, rows of the
full-attention layers' KV pool) and *checkpoints* (one state slot each: conv + recurrent state of all linear layers
after exactly ``position`` tokens). It stores integers only, never tensors.

Ownership. An index or slot is, at every moment, in exactly one of three hands:

- *free*: in its allocator;
- *held*: by a request, from ``allocate_kv`` / ``allocate_slot`` until it is passed to ``insert`` or freed;
- *cached*: by the cache, from ``insert`` until it is evicted, when the cache itself frees it to the allocator.

``free + cached + held == total`` for both resources is what ``check`` verifies.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from hybridcache.listener import Listener
    from hybridcache.stats import CacheStats

Tokens = npt.NDArray[np.int32]
"""Token ids of a prompt: contiguous int32, ids in [0, 2**31)."""

Indices = npt.NDArray[np.int32]
"""KV indices: contiguous int32, one per token."""


class Losses(NamedTuple):
    """Why the prompt tokens that were not reused were not, by cause; tokens. Sums with ``cached_len`` to the prompt."""

    never_seen: int
    """Past ``branch_len``: no request ever brought these tokens in this position."""
    kv_evicted: int
    """Seen (a ghost remembers), but their KV was evicted."""
    checkpoint_evicted: int
    """KV is there; a checkpoint that would have reached them was evicted."""
    never_checkpointed: int
    """KV is there; no checkpoint was ever saved at or past them."""
    below_grid: int
    """KV is there, but no grid position lies between them and the last token that may be skipped."""
    refused: int = 0
    """A checkpoint was there, but no memory could be had to resume from it."""


class PrefixMatch(NamedTuple):
    """What the cache holds of one prompt. Made by ``match``, which changes nothing; stale after the next insert or evict
    unless locked."""

    num_tokens: int
    """Length of the prompt."""
    cached_len: int
    """Deepest position with all KV and a checkpoint, at most ``num_tokens - 1``: what can be skipped."""
    kv_len: int
    """How deep KV alone reaches; >= ``cached_len``."""
    branch_len: int
    """How deep the tokens were ever seen, ghosts included; >= ``kv_len``."""
    checkpoint: int | None
    """Slot with the state at ``cached_len``; None at 0 and in attention-only caches."""
    losses: Losses
    node: Any
    """Opaque to callers: the node that ends at ``cached_len``; what ``lock``, ``touch`` and ``gather`` work on."""
    namespace: Hashable
    missed: Any = None
    """The deepest evicted checkpoint (a policy ``Item``) in (cached_len, num_tokens - 1] whose node or ghost is on the path:
    had it and its KV been kept, ``missed.position - cached_len`` more tokens would have been reused."""
    resumed: Any = None
    """The checkpoint (a policy ``Item``) at ``cached_len``; None at 0 and in attention-only caches."""


class InsertResult(NamedTuple):
    """What ``insert`` did with what it was given."""

    inserted_len: int
    """Leading tokens that are now in the tree (page-aligned down)."""
    duplicates: Indices
    """The caller's KV indices the tree already had rows for, still held by the caller: switch to the tree's (``gather``)
    and free these."""
    rejected_slots: tuple[int, ...]
    """Slots not taken (a checkpoint is there already, or the position can not carry one), still held by the caller."""
    node: Any
    """Opaque: the node that ends at ``inserted_len``."""


class Eviction(NamedTuple):
    """What one ``evict`` freed to the allocators."""

    num_tokens: int
    num_slots: int


class PrefixCache(Protocol):
    """A prefix cache behind which HybridRadixCache, RadixCache, NullCache and the rebuilt peers stand.

    ``tokens`` is int32[n]. ``namespace`` is any hashable: requests in different namespaces never share.
    """

    page_size: int
    grid: int
    stats: CacheStats

    @property
    def free_tokens(self) -> int:
        """KV rows that can be had without evicting. O(1), as the next three."""
        ...

    @property
    def free_slots(self) -> int:
        """State slots that can be had without evicting."""
        ...

    @property
    def cached_tokens(self) -> int:
        """KV rows in the cache's hands."""
        ...

    @property
    def num_checkpoints(self) -> int:
        """State slots in the cache's hands."""
        ...

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Read how much of ``tokens`` is cached. Changes nothing: no split, no recency. O(n). ValueError: not int32[n]."""
        ...

    def gather(self, node: Any) -> Indices:
        """KV indices from the root to the end of ``node``: int32[position]. O(position)."""
        ...

    def touch(self, match: PrefixMatch) -> None:
        """Count a use: refresh the consumed checkpoint (not the path's others) and the KV path's recency; record losses."""
        ...

    def lock(self, node: Any) -> Any:
        """Protect ``node``, its checkpoint and its path's KV from eviction; returns the receipt ``unlock`` takes.
        ValueError: ``node`` was evicted."""
        ...

    def unlock(self, receipt: Any) -> None:
        """Undo the ``lock`` that gave ``receipt``, which is void from then on. O(1). ValueError: another cache gave it."""
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
        """Publish ``tokens`` with their KV rows, int32[n] each, and checkpoints [(position, slot), ...].

        ``kv_indices[:owned_from]`` are the tree's own (the caller holds a lock over them); the rest the caller holds, and
        ownership of whatever is not in ``duplicates`` or past ``inserted_len`` passes to the cache; likewise slots not in
        ``rejected_slots``. ``labels`` are the placement words that asked for the checkpoints, one each (or none).
        ``after`` is a locked node whose path is ``tokens[:owned_from]`` (``match.node``, later ``result.node``): the walk then
        starts there, O(n - owned_from) instead of O(n).

        ValueError, and nothing changed: arrays that are not int32[n], fewer tokens in the tree than ``owned_from``, an ``after``
        that is evicted or not locked, malformed checkpoints or labels, a namespace that does not equal itself. Not checked,
        because it would cost a pass: that rows and slots are the caller's, that those below ``owned_from`` are the tree's, that
        ``after`` is of these tokens and this namespace. ``check`` finds rows and slots that are in two hands.
        """
        ...

    def allocate_kv(self, num_tokens: int) -> Indices | None:
        """Take rows for ``num_tokens`` tokens (whole pages), evicting as needed; None if that many can not be had."""
        ...

    def allocate_slot(self) -> int | None:
        """Take one state slot, evicting as needed; None if none can be had."""
        ...

    def free_kv(self, kv_indices: Indices) -> None:
        """Give rows back that the caller holds: taken by ``allocate_kv`` and never passed on. O(rows)."""
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
        """Tell ``listener``, beside those told already, of all that is cached and of every change from now on. O(cache)."""
        ...

    def unsubscribe(self, listener: Listener) -> None:
        """Tell ``listener`` nothing more."""
        ...

    def render(self, form: str = "text", max_nodes: int = 1000) -> str:
        """A picture of what is cached: ``text``, ``graphviz`` or ``svg``. O(nodes drawn)."""
        ...

    def check(self, held_tokens: int | None = None, held_slots: int | None = None) -> None:
        """Recompute every invariant from scratch; AssertionError names the first that fails. With ``held_*`` also
        ``free + cached + held == total``. O(tree)."""
        ...
