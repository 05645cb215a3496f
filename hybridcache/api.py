"""The protocol of a prefix cache, the data that it returns, and its counters.

Counters: every prompt token is a hit or a loss with a cause, per namespace; and what came and
went.

The contract of a prefix cache: its verbs, and who owns which index at every moment.

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

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from hybridcache.policies.protocol import Item
from hybridcache.radix.tree import NodeHandle, RadixNode
from hybridcache.tokens import Indices, Tokens

if TYPE_CHECKING:
    from hybridcache.allocators.arena import ArenaAllocator
    from hybridcache.allocators.moves import StepPlan, StepQueue


class Losses(NamedTuple):
    """Prompt tokens that were computed, by cause. They sum with ``cached_len`` to the prompt's
    length. ``match`` fills in all but the last two; ``losses_of`` adds those."""

    never_seen: int
    """Past ``seen_len``: no request ever brought these tokens in this position."""
    kv_evicted: int
    """Seen (a ghost remembers), but their KV was evicted."""
    checkpoint_evicted: int
    """KV is there; a checkpoint that would have reached them was evicted."""
    never_checkpointed: int
    """KV is there; no checkpoint was ever saved at or past them."""
    below_grid: int
    """KV is there, but no grid position lies between them and the last token that may be
    skipped."""
    refused: int = 0
    """A checkpoint was there, but no memory was available to resume from it."""
    not_fetched: int = 0
    """State and KV were stored, partly in lower tiers, and were not loaded: computing was faster,
    or the device had no free memory."""


class Resumable(NamedTuple):
    """A position that could be resumed from if what lies in lower tiers were fetched."""

    position: int
    rows: tuple[int, ...]
    """By tier, the nearest first: rows to copy to the device."""
    node: RadixNode
    """The position that ``fetch`` loads."""


class PrefixMatch(NamedTuple):
    """What the cache holds of one prompt. Made by ``match``, which changes nothing; stale after the
    next insert or evict unless locked."""

    num_tokens: int
    """Length of the prompt."""
    cached_len: int
    """Deepest position with all KV and a checkpoint, at most ``num_tokens - 1``: what can be
    skipped."""
    kv_match_len: int
    """How deep KV alone reaches; >= ``cached_len``."""
    seen_len: int
    """How deep the tokens were ever seen, ghosts included; >= ``kv_match_len``."""
    checkpoint: int | None
    """Slot with the state at ``cached_len``; None at 0 and in attention-only caches."""
    losses: Losses
    node: NodeHandle | None
    """The node that ends at ``cached_len``, for ``lock`` and ``gather``; None at 0."""
    namespace: Hashable
    missed: Item | None = None
    """The deepest evicted checkpoint (a policy ``Item``) in (cached_len, num_tokens - 1] whose node
    or ghost is on the path: had it and its KV been kept, ``missed_tokens`` more tokens would have
    been reused."""
    resumed: Item | None = None
    """The checkpoint (a policy ``Item``) at ``cached_len``; None at 0 and in attention-only
    caches."""
    loadable: tuple[Resumable, ...] = ()
    """Past ``cached_len``, ascending: what ``fetch`` could bring."""
    forks: bool = True
    """Whether other tokens were seen to follow at ``seen_len``; False: all that was seen ends
    there. True where it is not known."""

    @property
    def missed_tokens(self) -> int:
        """Tokens that ``missed`` would have saved beyond the checkpoint that was found; 0 if
        nothing was missed. A refused checkpoint was found, so its tokens do not count."""
        if self.missed is None:
            return 0
        return max(int(self.missed.position) - self.cached_len - self.losses.refused, 0)


NEAREST_FIRST = (2, 3, 4, 1, 0)
"""Fields of ``Losses`` in the order in which their tokens follow ``cached_len``."""


def losses_of(found: PrefixMatch, cached_len: int, loadable_len: int = 0) -> Losses:
    """Attribute each prompt token that a request computes to exactly one cause.

    ``found`` is the match before any memory was taken for the request, ``cached_len`` the position
    that it resumes from after refusals and loads, and ``loadable_len`` the deepest position that it
    could have loaded from lower tiers and did not (0 if there is none). The sum of the result and
    ``cached_len`` is ``found.num_tokens``. O(1).

    Tokens up to ``found.cached_len`` that are not reused were refused; those after it up to
    ``loadable_len`` were not fetched; all others keep the cause that ``found`` gives them.
    """
    refused = max(found.cached_len - cached_len, 0)
    reached_len = max(found.cached_len, cached_len)
    not_fetched = max(loadable_len - reached_len, 0)
    counts = list(found.losses)
    explained = reached_len + not_fetched - found.cached_len
    for cause in NEAREST_FIRST:
        taken = min(explained, counts[cause])
        counts[cause] -= taken
        explained -= taken
    return Losses._make((*counts[:5], refused, not_fetched))


class InsertResult(NamedTuple):
    """What ``insert`` did with what it was given."""

    inserted_len: int
    """Leading tokens that are now in the tree (page-aligned down)."""
    duplicates: Indices
    """The caller's KV indices the tree already had rows for, still held by the caller: switch to
    the tree's (``gather``) and free these."""
    rejected_slots: tuple[int, ...]
    """Slots not taken (a checkpoint is there already, or the position can not carry one), still
    held by the caller."""
    node: NodeHandle | None
    """The node that ends at ``inserted_len``; None if nothing was inserted."""


class Protected(NamedTuple):
    """Cached memory that no eviction can free now, because it is under locks."""

    num_tokens: int
    num_checkpoints: int


class Eviction(NamedTuple):
    """What one ``evict`` freed to the allocators."""

    num_tokens: int
    num_slots: int


MAX_NAMESPACES = 1024
"""Namespaces counted apart; beyond that, those that did not come again are folded into
``CacheStats.folded``."""


class Usage:
    """What the requests of one namespace asked for and got. Tokens, but for ``requests``, ``hits``
    and ``missed``."""

    __slots__ = (
        "below_grid",
        "cached_tokens",
        "checkpoint_evicted",
        "hits",
        "kv_evicted",
        "missed",
        "missed_tokens",
        "never_checkpointed",
        "never_seen",
        "not_fetched",
        "prompt_tokens",
        "refused",
        "requests",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.hits = 0
        """Requests that reused anything."""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.never_seen = 0
        self.kv_evicted = 0
        self.checkpoint_evicted = 0
        self.never_checkpointed = 0
        self.below_grid = 0
        self.refused = 0
        self.not_fetched = 0
        self.missed = 0
        """Requests that would have resumed deeper from a checkpoint that was evicted."""
        self.missed_tokens = 0
        """Tokens that those checkpoints would have saved."""

    def record(self, match: PrefixMatch) -> None:
        cached_len = match.cached_len
        self.requests += 1
        self.prompt_tokens += match.num_tokens
        if cached_len:
            self.hits += 1
            self.cached_tokens += cached_len
        losses = match.losses
        self.never_seen += losses[0]
        self.kv_evicted += losses[1]
        self.checkpoint_evicted += losses[2]
        self.never_checkpointed += losses[3]
        self.below_grid += losses[4]
        self.refused += losses[5]
        self.not_fetched += losses[6]
        if match.missed is not None:
            self.missed += 1
            self.missed_tokens += match.missed_tokens

    def merge(self, other: Usage) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def token_hit_rate(self) -> float:
        """Reused share of the prompt tokens; 0 before the first."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def request_hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in sorted(self.__slots__)}


class CacheStats:
    """What one cache has seen since it was made.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
    >>> cache.touch(cache.match(np.arange(10, dtype=np.int32), namespace="tenant"))
    >>> cache.stats.by_namespace["tenant"].never_seen, cache.stats.token_hit_rate
    (10, 0.0)
    """

    def __init__(self) -> None:
        self.by_namespace: OrderedDict[Hashable, Usage] = OrderedDict()
        self._known_requests: dict[Hashable, int] = {}
        self.folded = Usage()
        """Usage of namespaces that are no longer counted apart."""
        self.inserted_tokens = 0
        """KV rows that entered the cache."""
        self.inserted_slots = 0
        self.evicted_tokens = 0
        self.evicted_slots = 0
        self.evictions = 0
        """Times an item was chosen to go; its node's KV and checkpoint may both go with it."""
        self.refusals = 0
        """Allocations that could not be met."""

    @property
    def num_changes(self) -> int:
        """Grows whenever entries came or went, so that the result of a match may differ."""
        inserted = self.inserted_tokens + self.inserted_slots
        return inserted + self.evicted_tokens + self.evicted_slots

    def record(self, match: PrefixMatch) -> None:
        """Count one request. O(1)."""
        usage = self.by_namespace.get(match.namespace)
        if usage is None:
            usage = self._open(match.namespace)
        usage.record(match)

    def _open(self, namespace: Hashable) -> Usage:
        """Amortised O(1)."""
        # A second chance for each that came again since it was looked at, as in CLOCK: a use costs
        # nothing for it.
        while len(self.by_namespace) >= MAX_NAMESPACES:
            oldest, usage = self.by_namespace.popitem(last=False)
            if usage.requests > self._known_requests.pop(oldest, 1):
                self._known_requests[oldest] = usage.requests
                self.by_namespace[oldest] = usage
            else:
                self.folded.merge(usage)
        usage = self.by_namespace[namespace] = Usage()
        return usage

    @property
    def total(self) -> Usage:
        """All namespaces together. O(namespaces)."""
        total = Usage()
        for usage in (self.folded, *self.by_namespace.values()):
            total.merge(usage)
        return total

    @property
    def token_hit_rate(self) -> float:
        return self.total.token_hit_rate

    def clear(self) -> None:
        """Count from here on."""
        vars(self).update(vars(CacheStats()))

    def as_dict(self) -> dict[str, int]:
        """All counters, namespaces added up."""
        return self.total.as_dict() | {
            name: value for name, value in sorted(vars(self).items()) if isinstance(value, int)
        }


class Listener(Protocol):
    """Called right after (stored, split) or right before (chosen, removed) the change. Must not
    change the cache.

    Nor should it raise: the change is half done when it is notified, and is completed, so that the
    caller learns what it owns; the listener is unsubscribed and its error logged.

    A resident node is known by the serial of its KV, ``node.kv.serial``: unique for as long as the
    cache lives.
    """

    def kv_stored(self, node: RadixNode) -> None:
        """``node`` became resident. Its parent was before it."""
        ...

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        """``lower`` was cut in two; ``upper`` is the new one, above it."""
        ...

    def kv_removed(self, node: RadixNode) -> None:
        """A leaf's KV goes; its checkpoint went before."""
        ...

    def checkpoint_stored(self, node: RadixNode) -> None:
        """``node`` has a checkpoint at its end now; its KV was resident before."""
        ...

    def checkpoint_removed(self, node: RadixNode) -> None:
        """The checkpoint at the end of ``node`` goes; the KV stays for now."""
        ...

    def chosen(self, item: Item) -> None:
        """The policy chose ``item`` to go; what goes with it follows."""
        ...


class Listeners(Listener):
    """Several listeners, notified one after the other. One that raises is dropped, and the logger
    ``hybridcache`` says so."""

    def __init__(self, members: tuple[Listener, ...]) -> None:
        self.members = members

    def kv_stored(self, node: RadixNode) -> None:
        self._tell("kv_stored", node)

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        self._tell("kv_split", upper, lower)

    def kv_removed(self, node: RadixNode) -> None:
        self._tell("kv_removed", node)

    def checkpoint_stored(self, node: RadixNode) -> None:
        self._tell("checkpoint_stored", node)

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._tell("checkpoint_removed", node)

    def chosen(self, item: Item) -> None:
        self._tell("chosen", item)

    def _tell(self, change: str, *what: object) -> None:
        for member in self.members:
            try:
                getattr(member, change)(*what)
            except Exception:
                self.members = tuple(one for one in self.members if one is not member)
                import logging  # not at the top: it is needed here alone

                logging.getLogger("hybridcache").exception(
                    "%r raised when notified of %s: it is notified no more", member, change
                )


def members_of(listener: Listener | None) -> tuple[Listener, ...]:
    """The listeners behind ``listener``: those it forwards to, itself alone, or none."""
    if isinstance(listener, Listeners):
        return listener.members
    return () if listener is None else (listener,)


def joined(members: tuple[Listener, ...]) -> Listener | None:
    """One listener for all ``members``; None where there is none."""
    return Listeners(members) if members else None


def introduce(listener: Listener, nodes: Iterable[RadixNode]) -> None:
    """Tell ``listener`` of all that is cached in ``nodes``, parents before children. O(nodes)."""
    for node in nodes:
        if node.kv is not None:
            listener.kv_stored(node)
        if node.checkpoint is not None:
            listener.checkpoint_stored(node)


class Offload(Protocol):
    """Host and disk tiers of a cache (``hybridcache.offload``), as an engine uses them."""

    names: tuple[str, ...]
    """Names of the tiers, the nearest first: ``host``, ``disk``."""
    row_bytes: int
    """Bytes of one row, the same in all tiers."""
    state_rows: int
    """Rows that one state takes in a tier."""
    copied_rows: dict[tuple[str, str], int]
    """Rows copied so far, by (source tier, destination tier)."""


class PrefixCache(Protocol):
    """A prefix cache as HybridRadixCache, RadixCache, NullCache and PlainCache implement it.

    ``tokens`` is int32[n]. ``namespace`` is None, a str, bytes, an int, or a tuple of these
    (``hybridcache.tokens``; ValueError for others): requests in different namespaces never
    share.
    """

    page_size: int
    grid: int
    stats: CacheStats
    arena: ArenaAllocator | None
    """Where rows and slots are of one memory: what tells holders of moves. None: rows never
    move."""
    offload: Offload | None
    """Host and disk tiers, or None if there are none."""
    steps: StepQueue
    """The next step plan while it grows; leases register here."""

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
        self,
        tokens: Tokens,
        max_tokens: int,
        namespace: Hashable = None,
        after: NodeHandle | None = None,
    ) -> Tokens:
        """Up to ``max_tokens`` ids that followed ``tokens`` before, in this namespace, as far as is
        remembered (evicted KV does not matter); empty: nothing did. Changes nothing. Where several
        did, what was used last.

        ``after`` as in ``insert``: a locked node whose path begins ``tokens``. O(n less that
        node's position), a few microseconds.
        """
        ...

    def gather(self, node: NodeHandle | None) -> Indices:
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

    def lock(self, node: NodeHandle | None) -> Any:
        """Protect ``node``, its checkpoint and its path's KV from eviction; returns the receipt
        ``unlock`` takes. ValueError: ``node`` was evicted."""
        ...

    def lock_kv(self, tokens: Tokens, namespace: Hashable = None) -> tuple[NodeHandle | None, Any]:
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
        after: NodeHandle | None = None,
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

    def protected(self) -> Protected:
        """Return how much of the cached memory is under locks, shared paths counted once. Amortised
        O(1) per lock taken or returned since the last call."""
        ...

    def iter_nodes(self) -> Iterator[RadixNode]:
        """Iterate over the nodes of the tree, parents before children, ghosts included.

        For reading only: ``node.kv`` is None for ghosts, ``node.checkpoint`` is None where there is
        no state. The cache must not change meanwhile. O(tree).
        """
        ...

    def take_step(self) -> StepPlan:
        """Return all work on the tensors that is due before the next step, once.

        The owner of the tensors carries it out in the order given there: transfers (moves and tier
        copies), row writes, restores. Rows and slots that the cache hands out are valid for a step
        only after the plan was taken that follows them. A caller without tensors takes plans too,
        and drops them: they would pile up otherwise. O(transfers + rows written).
        """
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
