"""Data that a prefix cache returns, its counters, and its listeners.

A prefix cache keeps two resources for prefixes that may come again. *KV indices* are rows of the KV
pool of the full-attention layers, one per token. *Checkpoints* are state slots: one holds the conv
and recurrent state of all linear layers after exactly ``position`` tokens. The cache stores
integers only, never tensors.

Ownership. At any moment, an index or slot has exactly one of three owners:

- *free*: the allocator;
- *held*: a request, from ``allocate_kv`` / ``allocate_slot`` until the index is passed to
  ``insert`` or freed;
- *cached*: the cache, from ``insert`` until the eviction, which returns it to the allocator.

``check`` verifies that ``free + cached + held == total`` for both resources.

Counters. Each prompt token is a hit or a loss with one cause (``Losses``), counted per namespace.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hybridcache.allocators.moves import Indices
from hybridcache.radix.protocol import LoadRule
from hybridcache.radix.tree import Checkpoint, NodeHandle, RadixNode


class Losses(NamedTuple):
    """Number of prompt tokens that were computed, by cause: a named tuple.

    The counts and ``cached_len`` sum to the length of the prompt. ``match`` sets all but the last
    two; ``losses_of`` adds those.
    """

    never_seen: int
    """Tokens past ``seen_len``: no earlier request had them in this position, in whole pages."""
    kv_evicted: int
    """Tokens seen before (a ghost remembers them) with evicted KV."""
    checkpoint_evicted: int
    """Tokens with KV that an evicted checkpoint would have covered."""
    never_checkpointed: int
    """Tokens with KV, but no checkpoint was ever saved at or past them."""
    below_grid: int
    """Tokens with KV, without a grid position between them and the last token that may be skipped.
    """
    refused: int = 0
    """Tokens with a checkpoint that could not be used, because no memory was available."""
    not_fetched: int = 0
    """Tokens with a state and KV in a lower tier that were not loaded, because computing was faster
    or the device had no free memory."""


class Resumable(NamedTuple):
    """Position that could be resumed from after a load from offload tiers."""

    position: int
    """Number of tokens that could be skipped after the load."""
    node: RadixNode
    """Node that ends at ``position``, for ``load``."""
    num_bytes: Mapping[str, int]
    """Number of bytes to copy to the device, by tier."""


class PrefixMatch(NamedTuple):
    """Cached part of one prompt.

    Made by ``match``, which changes nothing. It is stale after the next insertion or eviction
    unless ``node`` is locked.
    """

    num_tokens: int
    """Length of the prompt."""
    cached_len: int
    """Deepest position with all KV and a checkpoint, at most ``num_tokens - 1``. These tokens can
    be skipped."""
    kv_match_len: int
    """Length of the matching KV; at least ``cached_len``."""
    seen_len: int
    """Length of the tokens seen before, ghosts included; at least ``kv_match_len``."""
    losses: Losses
    """Number of the other tokens, by the reason why they must be computed."""
    node: NodeHandle | None
    """Node that ends at ``cached_len``, for ``lock`` and ``gather``. None at 0."""
    namespace: Hashable
    """Namespace of the request."""
    missed: Checkpoint | None = None
    """Deepest evicted checkpoint in (cached_len, num_tokens - 1] on the path of the prompt, or
    None. With it and its KV, ``missed_tokens`` more tokens would have been reused."""
    resumed: Checkpoint | None = None
    """Checkpoint at ``cached_len``. None at 0 and in attention-only caches."""
    loadable: tuple[Resumable, ...] = ()
    """Positions past ``cached_len`` that ``load`` could load, ascending."""
    forks: bool = True
    """True if other tokens were seen after ``seen_len``, or if that is not known. False if all
    known prompts end there."""

    @property
    def checkpoint(self) -> int | None:
        """Slot of the state at ``cached_len``. None at 0 and in attention-only caches."""
        return None if self.resumed is None else self.resumed.slot

    @property
    def missed_tokens(self) -> int:
        """Number of tokens that ``missed`` would have saved beyond the checkpoint that was found,
        refused or not; 0 if nothing was missed."""
        if self.missed is None:
            return 0
        return max(self.missed.position - self.cached_len - self.losses.refused, 0)

    def best_load(self, exchange: LoadRule) -> Resumable | None:
        """Return the position whose load saves the most time, or None if none saves any. Raises
        TypeError if the rule returns no number."""
        best, most = None, 0.0
        for one in self.loadable:
            seconds_saved = exchange.seconds_saved(
                self.cached_len, one.position, self.num_tokens, one.num_bytes
            )
            try:
                if seconds_saved > most:
                    best, most = one, seconds_saved
            except TypeError:
                raise TypeError(
                    f"seconds_saved of {exchange!r} must return a number (got {seconds_saved!r})."
                ) from None
        return best


NEAREST_FIRST = (2, 3, 4, 1, 0)
"""Indices of the fields of ``Losses``, in the order in which their tokens follow ``cached_len``."""


def losses_of(
    found: PrefixMatch, cached_len: int, loadable_len: int = 0, step: int | None = None
) -> Losses:
    """Attribute each prompt token that a request computes to exactly one cause.

    ``found`` is the match before any memory was taken for the request. ``cached_len`` is the
    position that it resumes from, after refusals and loads. ``loadable_len`` is the deepest
    position that could have been loaded from offload tiers and was not, or 0. The sum of the result
    and ``cached_len`` is ``found.num_tokens``. O(1).

    Tokens up to ``found.cached_len`` that are not reused count as refused. Those after it up to
    ``loadable_len`` count as not fetched. All others keep their cause in ``found``, with one
    exception: tiers do not store KV after the deepest checkpoint, so such tokens count as if they
    had KV. ``step`` is the distance of checkpoint positions in a cache with tiers, else None.
    """
    refused = max(found.cached_len - cached_len, 0)
    reached_len = max(found.cached_len, cached_len)
    end = max(reached_len, loadable_len)
    counts, explained = list(found.losses), end - found.cached_len
    for cause in NEAREST_FIRST:
        taken = min(explained, counts[cause])
        counts[cause] -= taken
        explained -= taken
    if step is not None and (found.missed is None or found.missed.position <= end):
        tail, counts[1] = counts[1], 0
        grid_len = min(found.seen_len, found.num_tokens - 1) // step * step
        below = min(found.seen_len - grid_len, tail)
        counts[3] += tail - below
        counts[4] += below
    return Losses._make((*counts[:5], refused, end - reached_len))


class InsertResult(NamedTuple):
    """Result of ``insert``."""

    inserted_len: int
    """Number of leading tokens that are now in the tree, in whole pages."""
    duplicates: Indices
    """KV indices of the caller for which the tree already had rows. The caller still holds them:
    use the rows of the tree (``gather``) and free these."""
    rejected_slots: tuple[int, ...]
    """Slots that were not taken, still held by the caller. The position already has a checkpoint,
    or cannot have one."""
    node: NodeHandle | None
    """Node that ends at ``inserted_len``, or None if nothing was inserted."""


class Protected(NamedTuple):
    """Cached memory that cannot be evicted now, because it is locked."""

    num_tokens: int
    """Number of protected KV rows."""
    num_checkpoints: int
    """Number of protected checkpoints."""


class Eviction(NamedTuple):
    """Memory that one ``evict`` returned to the allocators."""

    num_tokens: int
    """Number of freed KV rows."""
    num_slots: int
    """Number of freed state slots."""


MAX_NAMESPACES = 1024
"""Number of namespaces that are counted separately, the first ones. Requests of all others are
counted in ``CacheStats.others``."""


@dataclass(slots=True)
class Usage:
    """Counters of the requests of one namespace, in tokens except for ``requests`` and ``hits``.

    ``never_seen`` to ``not_fetched`` are sums of the fields of ``Losses``. With ``cached_tokens``,
    they sum to ``prompt_tokens``.
    """

    requests: int = 0
    """Number of requests that began to compute, without those that resumed after a
    preemption."""
    hits: int = 0
    """Number of requests that reused at least one token."""
    prompt_tokens: int = 0
    """Length of all prompts."""
    cached_tokens: int = 0
    """Number of prompt tokens that were reused."""
    never_seen: int = 0
    kv_evicted: int = 0
    checkpoint_evicted: int = 0
    never_checkpointed: int = 0
    below_grid: int = 0
    refused: int = 0
    not_fetched: int = 0

    @property
    def token_hit_rate(self) -> float:
        """Reused fraction of the prompt tokens; 0 before the first request."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def request_hit_rate(self) -> float:
        """Fraction of the requests that reused at least one token; 0 before the first request."""
        return self.hits / self.requests if self.requests else 0.0

    def as_dict(self) -> dict[str, int]:
        """Return all counters by name."""
        return {name: getattr(self, name) for name in sorted(self.__slots__)}


class CacheStats:
    """Counters of one cache since its construction.

    ``total`` sums the requests, hits and losses of all namespaces, ``by_namespace`` has those of
    each. The other counters are of the cache as a whole.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
    >>> cache.touch(cache.match(np.arange(10, dtype=np.int32), namespace="tenant"))
    >>> cache.stats.by_namespace["tenant"].never_seen, cache.stats.total.token_hit_rate
    (10, 0.0)
    >>> cache.stats
    CacheStats(never_seen=10, prompt_tokens=10, requests=1)
    """

    def __init__(self) -> None:
        self.by_namespace: dict[Hashable, Usage] = {}
        """Counters of each namespace, at most ``MAX_NAMESPACES`` of them."""
        self.others = Usage()
        """Sum over the namespaces that are not counted separately."""
        self.inserted_tokens = 0
        """Number of KV rows that entered the cache."""
        self.inserted_slots = 0
        """Number of checkpoints that entered the cache."""
        self.evicted_tokens = 0
        """Number of KV rows that left the cache."""
        self.evicted_slots = 0
        """Number of checkpoints that left the cache."""
        self.evictions = 0
        """Number of victims. One eviction can free the KV and the checkpoint of its node."""
        self.refusals = 0
        """Number of calls of ``allocate_kv`` and ``allocate_slot`` that returned None. A refused
        ``begin``, ``extend`` or ``load`` is one of them. ``refused`` counts tokens, not calls."""
        self.rebuilds = 0
        """Number of times that ``HybridRadixCache.rebuilt`` has replaced the cache."""

    @property
    def num_changes(self) -> int:
        """Counter that grows whenever an entry is added or removed, so that a match may differ."""
        inserted = self.inserted_tokens + self.inserted_slots
        return inserted + self.evicted_tokens + self.evicted_slots

    def record(self, match: PrefixMatch) -> None:
        """Count one request. O(1)."""
        usage = self.by_namespace.get(match.namespace)
        if usage is None:
            usage = self.others
            if len(self.by_namespace) < MAX_NAMESPACES:
                usage = self.by_namespace[match.namespace] = Usage()
        usage.requests += 1
        usage.prompt_tokens += match.num_tokens
        usage.hits += match.cached_len > 0
        usage.cached_tokens += match.cached_len
        losses = match.losses
        usage.never_seen += losses[0]
        usage.kv_evicted += losses[1]
        usage.checkpoint_evicted += losses[2]
        usage.never_checkpointed += losses[3]
        usage.below_grid += losses[4]
        usage.refused += losses[5]
        usage.not_fetched += losses[6]

    @property
    def total(self) -> Usage:
        """Sum over all namespaces. O(namespaces)."""
        parts = (self.others, *self.by_namespace.values())
        return Usage(*(sum(getattr(one, name) for one in parts) for name in Usage.__slots__))

    def clear(self) -> None:
        """Set all counters to 0."""
        vars(self).update(vars(CacheStats()))

    def as_dict(self) -> dict[str, int]:
        """Return all counters, summed over namespaces."""
        return self.total.as_dict() | {
            name: value for name, value in sorted(vars(self).items()) if isinstance(value, int)
        }

    def __repr__(self) -> str:
        counters = (f"{name}={value}" for name, value in self.as_dict().items() if value)
        return f"CacheStats({', '.join(counters)})"


class Listener:
    """Subscriber to the changes of a cache.

    A method is called right after the change (stored, split) or right before it (removed). It must
    not change the cache. It should not raise: the change is completed nevertheless, the listener is
    unsubscribed and its error is logged. In ``subscribe`` no change is under way, so the error is
    raised there, and the listener is not subscribed.

    Methods that a subclass does not define do nothing. ``node.kv.serial`` identifies a resident
    node. It is unique for the lifetime of the cache, so a listener follows one cache at a time.
    """

    followed: object = None
    """Cache to which it is subscribed, or None."""

    def kv_stored(self, node: RadixNode) -> None:
        """Handle that ``node`` became resident. Its parent already is."""

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        """Handle that ``lower`` was split; ``upper`` is the new node above it."""

    def kv_removed(self, node: RadixNode) -> None:
        """Handle that a leaf loses its KV. Its checkpoint was removed before."""

    def checkpoint_relabelled(self, node: RadixNode) -> None:
        """Handle that the answer of ``node.checkpoint`` has ended, for its new stop reason."""

    def checkpoint_stored(self, node: RadixNode) -> None:
        """Handle that ``node``, which is resident, has a checkpoint at its end."""

    def checkpoint_removed(self, node: RadixNode) -> None:
        """Handle that ``node`` loses its checkpoint. Its KV remains for now."""

    def cleared(self) -> None:
        """Handle that everything was removed without further calls. The listener then follows
        another cache, which is empty (``HybridRadixCache.rebuilt``)."""
