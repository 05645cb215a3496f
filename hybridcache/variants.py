"""Other caches: with offload tiers, attention-only, and none at all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from hybridcache.allocators.arena import arena_of, step_queue_of
from hybridcache.allocators.moves import StepPlan
from hybridcache.allocators.pages import PageAllocator
from hybridcache.allocators.slots import SlotAllocator
from hybridcache.api import (
    CacheStats,
    Eviction,
    InsertResult,
    Listener,
    LockHandle,
    Losses,
    PrefixCache,
    PrefixMatch,
    Protected,
    Resumable,
)
from hybridcache.hybrid import HybridRadixCache
from hybridcache.offload import OffloadTiers, Tier
from hybridcache.policies.protocol import Item, raise_failure
from hybridcache.radix.ghosts import read_ghosts
from hybridcache.radix.tree import (
    Checkpoint,
    NodeHandle,
    OffloadedCheckpoint,
    PathPart,
    RadixNode,
)
from hybridcache.residency import Residency, make_room_for_kv, make_room_for_slot
from hybridcache.tokens import INT32, Indices, Tokens, require_int32


def fetch(residency: Residency, offload: OffloadTiers, target: NodeHandle) -> bool:
    """Make the state at ``target`` and the KV of its path resident.

    Returns False if the entry is gone or the device has no room for it. Evictions made on the way
    remain. O(tokens loaded), plus the evictions.
    """
    if (
        not isinstance(target, RadixNode)
        or target.offloaded is None
        or target.offloaded.state is None
    ):
        return False
    now = residency.now + 1
    offload.used(target.offloaded.state, now)
    if target.lost_checkpoint is not None:
        residency.policy.on_ghost_hit(target.lost_checkpoint)
    taken = offload.take(target)
    base = taken.nodes[0].parent if taken.nodes else target
    assert base is not None
    is_locked = base.parent is not None
    if is_locked:
        residency.lock(base)
    num_tokens = target.end - base.end
    slot = _allocate_slot(residency)
    rows = None if slot is None else _allocate_kv(residency, num_tokens)
    if slot is None or rows is None:
        if slot is not None:
            residency.slots.free(slot)
        offload.unused(taken.state)
        offload.put_back(taken)
        residency.ghosts.trim()
    else:
        _revive(residency, taken.nodes, rows)
        offload.give(taken, rows, slot)
        state = taken.state
        offload.unused(state)  # The request that resumes from it counts as its use.
        residency.store_checkpoint(target, slot, state.label, not taken.nodes, None, state.uses)
        if taken.nodes:
            residency.offer_leaf(target)
    if is_locked:
        residency.unlock(base)
    return rows is not None


def _allocate_slot(residency: Residency) -> int | None:
    slot = residency.slots.allocate()
    if slot is None and make_room_for_slot(residency):
        slot = residency.slots.allocate()
    return slot


def _allocate_kv(residency: Residency, num_tokens: int) -> Indices | None:
    rows = residency.pages.allocate(num_tokens)
    if rows is None and make_room_for_kv(residency, num_tokens):
        rows = residency.pages.allocate(num_tokens)
    return rows


def _revive(residency: Residency, nodes: tuple[RadixNode, ...], rows: Indices) -> None:
    """Make ``nodes``, a path of ghosts that are in no list, resident."""
    start = 0
    for node in nodes:
        parent = node.parent
        assert parent is not None
        if not start:
            residency.expect_child(parent)
        end = start + node.end - node.start
        residency.tree.revive(node)
        residency.store_rows(node, rows[start:end].copy())
        start = end


def adopt(
    residency: Residency, offload: OffloadTiers, tokens: Tokens, namespace: Hashable, number: int
) -> tuple[int, Indices, Indices] | None:
    """See ``TieredRadixCache.adopt``."""
    tree, tier = residency.tree, offload.tiers[number]
    node, inside, length = tree.walk(tree.root(namespace), tokens)
    if inside is None:
        node, inside, length = tree.walk(node, tokens[node.end :], ghosts=True)
    known = node
    while known.parent is not None and known.kv is None and not offload.is_stored(known):
        known = known.parent
    start = known.end
    if inside is not None and known is node:
        is_there = inside.kv is not None or offload.is_stored(inside)
        start, known = (length, inside) if is_there else (start, known)
    # A resident node may have an ``OffloadedEntry`` for its children. Its ``kv_tier`` is undefined.
    entry = known.offloaded
    too_low = entry is not None and entry.kv is not None and entry.kv_tier > number
    is_whole = inside is None and length == len(tokens)
    has_state = is_whole and (node.checkpoint is not None or _has_state(node))
    num_rows = len(tokens) - start + offload.state_rows
    if too_low or has_state or num_rows > tier.pages.num_free:
        tree.prune_root(namespace)
        return None
    if inside is not None and length > node.end:
        is_plain = inside.kv is None and not offload.is_stored(inside)
        node = residency.split(inside, length)
        if is_plain:
            residency.ghosts.add(node)
    if length < len(tokens):
        node = tree.grow(node, tokens[length:])
        tree.fade(node)
        residency.ghosts.add(node)
    kv_rows = tier.pages.allocate(len(tokens) - start)
    state_rows = tier.pages.allocate(offload.state_rows)
    assert kv_rows is not None and state_rows is not None
    target = node
    while node.end > start:
        assert node.parent is not None
        residency.ghosts.discard(node)
        offload.hold_kv(node, number, kv_rows[node.parent.end - start : node.end - start].copy())
        node = node.parent
    offload.hold_state(_known(residency, target, number, state_rows))
    return start, kv_rows, state_rows


def _known(
    residency: Residency, target: RadixNode, number: int, rows: Indices
) -> OffloadedCheckpoint:
    """Return the item for a state that an earlier process stored, with its remembered age and
    uses."""
    was = target.lost_checkpoint
    if was is not None:
        was.stored = OffloadedCheckpoint.offered(was, number, rows)
        return was.stored
    serial = residency.num_items
    residency.num_items = serial + 1
    return OffloadedCheckpoint(target, number, rows, residency.now, serial, residency.item_bytes)


def _has_state(node: RadixNode) -> bool:
    return node.offloaded is not None and node.offloaded.state is not None


class TieredRadixCache(HybridRadixCache):
    """``HybridRadixCache`` that offloads evicted entries to host memory and disk.

    Made by ``CacheConfig(host_bytes=..., disk_bytes=...)``. The copies between tiers are part of
    ``take_step().transfers``.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> config = CacheConfig(
    ...     num_kv_tokens=16,
    ...     num_slots=1,
    ...     grid=4,
    ...     kv_bytes_per_token=2,
    ...     state_bytes=8,
    ...     host_bytes=64,
    ... )
    >>> cache, prompt = build_prefix_cache(config), np.arange(10, dtype=np.int32)
    >>> _ = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
    >>> cache.evict(num_tokens=10)
    Eviction(num_tokens=10, num_slots=1)

    The evicted prefix is on the host, and can be loaded:

    >>> match = cache.match(prompt)
    >>> match.cached_len, [(one.position, one.rows) for one in match.loadable]
    (0, [(8, (12,))])
    >>> cache.fetch(match.loadable[0]), cache.match(prompt).cached_len
    (True, 8)

    The next step plan has the copies in both directions:

    >>> [(copy.kind, copy.src_tier, copy.dst_tier) for copy in cache.take_step().transfers]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('checkpoint', 'device', 'host'), ('kv', 'device', 'host'),
     ('kv', 'host', 'device'), ('checkpoint', 'host', 'device')]
    >>> cache.check(held_tokens=0, held_slots=0)
    """

    offload: OffloadTiers
    """Host and disk tiers."""

    def attach(
        self, tiers: tuple[Tier, ...], state_rows: int, make: type[OffloadTiers] = OffloadTiers
    ) -> None:
        """Use ``tiers``, the nearest first, in which a state takes ``state_rows`` rows.

        The cache must be empty. ``make`` is a subclass with another rule, for studies.
        """
        residency = self._residency
        offload = make(tiers, residency.ghosts, residency.item_bytes, state_rows, self.steps)
        self.offload = residency.offload = offload

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Look up ``tokens`` as in ``HybridRadixCache.match``, with the positions that could be
        loaded. O(n)."""
        for tier in self.offload.tiers:
            raise_failure(tier.policy.failure)
        found = super().match(tokens, namespace)
        root = self._tree.find_root(namespace)
        if root is None:
            return found
        node, inside, _ = self._tree.walk(root, tokens)
        if inside is None and node.ghosts:
            node, _, _ = self._tree.walk(node, tokens[node.end :], ghosts=True)
        loadable = self._resumable(node, found.cached_len, found.num_tokens)
        return found._replace(loadable=loadable) if loadable else found

    def _resumable(
        self, node: RadixNode, cached_len: int, num_tokens: int
    ) -> tuple[Resumable, ...]:
        """Return the loadable states past ``cached_len`` on the path of ``node``.

        O(nodes of the path).
        """
        path = []
        while node.parent is not None and node.end > cached_len:
            path.append(node)
            node = node.parent
        found, num_rows = [], [0] * len(self.offload.tiers)
        for node in reversed(path):
            entry = node.offloaded
            if node.kv is None:
                if entry is None or entry.kv is None:
                    break
                num_rows[entry.kv_tier] += len(entry.kv)
            if entry is not None and entry.state is not None and node.end < num_tokens:
                rows = list(num_rows)
                rows[entry.state.tier] += self.offload.state_rows
                found.append(Resumable(node.end, tuple(rows), node))
        return tuple(found)

    def fetch(self, resumable: Resumable) -> bool:
        """Load ``resumable``, of the latest ``match``, to the device. Returns False if there is no
        room.

        The new rows are valid at once; the bytes follow with the next ``take_step``. O(tokens
        loaded), plus evictions that make room.
        """
        return fetch(self._residency, self.offload, resumable.node)

    def adopt(
        self, tokens: Tokens, namespace: Hashable = None, tier: str = "disk"
    ) -> tuple[int, Indices, Indices] | None:
        """Register the KV of all ``tokens`` and the state after them, which an earlier process
        stored.

        Returns (start, KV rows of tokens[start:], rows of the state), newly taken in ``tier``, or
        None if they are already known or there is no room. Adds no transfers: the caller fills the
        rows, or reads its own files for them. O(n).

        Raises:
            ValueError: ``tokens`` is not int32[n], n is not a multiple of the grid and the page, or
                there is no such tier.
        """
        require_int32(tokens, "tokens")
        if tier not in self.offload.names:
            raise ValueError(f"tier must be one of {', '.join(self.offload.names)} (got {tier!r})")
        if not len(tokens) or len(tokens) % self._step:
            raise ValueError(
                f"the number of tokens must be a positive multiple of {self._step}, the grid in "
                f"whole pages (got {len(tokens)})"
            )
        number = self.offload.names.index(tier)
        return adopt(self._residency, self.offload, tokens, namespace, number)

    def drop_lost(self, tier: str, is_lost: Callable[[Indices], bool]) -> None:
        """Remove entries that ``tier`` can no longer read.

        ``is_lost`` is called with the rows of one state, or of the KV of one node. Entries that
        depend on them are freed too, in this tier and in those after it. Call it only if no
        transfers are pending, because rows that a transfer is about to fill are not lost. O(tree).
        """
        nodes = list(self._tree.nodes())
        self.offload.lose(nodes, self.offload.names.index(tier), is_lost)
        self._residency.ghosts.trim()

    def touch(self, match: PrefixMatch, resumes: bool = False) -> None:
        """Record a use as in ``HybridRadixCache.touch``, and notify the tier that dropped the
        missed entry."""
        super().touch(match, resumes)
        if isinstance(match.missed, Checkpoint):
            self.offload.on_ghost_hit(match.missed)

    def reset(self) -> None:
        """Remove everything that is not locked, in all tiers. O(tree)."""
        self.offload.clear()
        self._residency.offload = None
        super().reset()
        self._residency.offload = self.offload


class RadixCache(HybridRadixCache):
    """Attention-only cache: resumes from KV alone, at any multiple of grid and page.

    It stores no checkpoints, and has ``ItemBytes(state=0)``, so no KV is ever dead.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(prefix_cache="radix", num_kv_tokens=100, grid=4))
    >>> result = cache.insert(np.arange(10, dtype=np.int32), cache.allocate_kv(10))
    >>> cache.match(np.arange(7, dtype=np.int32)).cached_len
    4
    """

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Look up how much of ``tokens`` is cached, and the causes of the losses. Changes nothing.
        O(n)."""
        if getattr(tokens, "dtype", None) is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        raise_failure(self._residency.policy.failure)
        num_tokens = len(tokens)
        root = self._tree.find_root(namespace)
        if root is None:
            losses = Losses(num_tokens, 0, 0, 0, 0)
            return PrefixMatch(num_tokens, 0, 0, 0, None, losses, None, namespace)
        node, inside, kv_match_len = self._tree.walk(root, tokens)
        seen_len = kv_match_len
        if inside is None and node.ghosts:
            seen_len, _, _ = read_ghosts(self._tree, node, tokens)
        reachable = min(kv_match_len, num_tokens - 1)
        cached_len = max(reachable - reachable % self._step, 0)
        losses = Losses(
            num_tokens - seen_len, seen_len - kv_match_len, 0, 0, kv_match_len - cached_len
        )
        part = None
        if cached_len:
            deepest = inside if inside is not None else node
            part = PathPart(PathPart(deepest, cached_len).last(), cached_len)
        return PrefixMatch(
            num_tokens, cached_len, kv_match_len, seen_len, None, losses, part, namespace
        )

    def continuation(
        self,
        tokens: Tokens,
        max_tokens: int,
        namespace: Hashable = None,
        after: NodeHandle | None = None,
    ) -> Tokens:
        """Return up to ``max_tokens`` ids that followed ``tokens``; see
        ``PrefixCache.continuation``.

        O(n), or O(tokens past ``after``).
        """
        node = after.last().parent if isinstance(after, PathPart) else after
        return super().continuation(tokens, max_tokens, namespace, node)

    def gather(self, node: NodeHandle | None) -> Indices:
        """Return the KV indices of ``match.node`` or ``result.node``. O(position)."""
        if isinstance(node, PathPart):
            return super().gather(node)[: node.length]
        return super().gather(node)

    def lock(self, node: NodeHandle | None) -> LockHandle:
        """Protect the KV of the path up to ``node``. Splits an edge if the hit ends inside it.
        O(page).

        Raises:
            ValueError: ``node`` was evicted, or belongs to another cache.
        """
        if isinstance(node, PathPart):
            last = node.last()
            self._refuse_unusable(last)
            node = self._residency.split(last, node.length) if last.end > node.length else last
        return super().lock(node)

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
        """Publish ``tokens`` with their rows. All checkpoints are rejected."""
        rejected_slots = tuple(slot for _, slot in checkpoints)
        result = super().insert(tokens, kv_indices, (), namespace, owned_from, (), after)
        return result._replace(rejected_slots=rejected_slots)

    @property
    def has_slots(self) -> bool:
        """False if the cache was built without state slots. O(1)."""
        return self._slots.capacity > 0


class NullCache(PrefixCache):
    """Allocator of KV rows and slots that caches nothing. Every method is O(1) plus the rows
    returned.

    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(prefix_cache="none", num_kv_tokens=100))
    >>> len(cache.allocate_kv(60)), cache.allocate_kv(60)
    (60, None)
    """

    cached_tokens = 0
    num_checkpoints = 0

    def __init__(self, pages: PageAllocator, slots: SlotAllocator, *, grid: int) -> None:
        self.page_size = pages.page_size
        self.grid = grid
        self.stats = CacheStats()
        self.arena = arena_of(pages)
        self.offload = None
        self.steps = step_queue_of(pages)
        self._pages = pages
        self._slots = slots

    @property
    def free_tokens(self) -> int:
        return self._pages.num_free

    @property
    def free_slots(self) -> int:
        return self._slots.num_free

    @property
    def has_slots(self) -> bool:
        """False if the cache was built without state slots. O(1)."""
        return self._slots.capacity > 0 or self._slots.budget is not None

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Return a miss: every token counts as never seen. O(1)."""
        require_int32(tokens, "tokens")
        n = len(tokens)
        return PrefixMatch(n, 0, 0, 0, None, Losses(n, 0, 0, 0, 0), None, namespace)

    def fetch(self, resumable: Resumable) -> bool:
        """Return False, because nothing is stored."""
        return False

    def continuation(
        self,
        tokens: Tokens,
        max_tokens: int,
        namespace: Hashable = None,
        after: NodeHandle | None = None,
    ) -> Tokens:
        """Return no tokens: nothing is remembered."""
        require_int32(tokens, "tokens")
        return tokens[:0]

    def gather(self, node: NodeHandle | None) -> Indices:
        return self._pages.free_rows()[:0]

    def touch(self, match: PrefixMatch, resumes: bool = False) -> None:
        if not resumes:
            self.stats.record(match)

    def lock(self, node: NodeHandle | None) -> LockHandle:
        """Return a handle that protects nothing."""
        return LockHandle(None, None)

    def lock_kv(self, tokens: Tokens, namespace: Hashable = None) -> tuple[None, LockHandle]:
        """Return (None, a handle that protects nothing)."""
        return None, LockHandle(None, None)

    def unlock(self, handle: LockHandle) -> None:
        """Do nothing."""

    def protected(self) -> Protected:
        """Return zeros: nothing is cached."""
        return Protected(0, 0)

    def iter_nodes(self) -> Iterator[RadixNode]:
        """Iterate over no nodes."""
        return iter(())

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
        """Store nothing: the caller still holds all rows and slots."""
        require_int32(tokens, "tokens")
        require_int32(kv_indices, "KV indices")
        return InsertResult(0, kv_indices[:0], tuple(slot for _, slot in checkpoints), None)

    def label_tip(self, node: NodeHandle | None, stop_reason: str) -> None:
        """Do nothing."""

    def announce_checkpoint(self, node: NodeHandle | None) -> Item | None:
        """Return None, because nothing is cached."""
        return None

    def withdraw_announcement(self, announced: Item) -> None:
        """Do nothing."""

    def allocate_kv(self, num_tokens: int) -> Indices | None:
        """Take free rows, or return None and count a refusal if there are too few."""
        rows = self._pages.allocate(num_tokens)
        self.stats.refusals += rows is None
        return rows

    def allocate_slot(self) -> int | None:
        """Take a free slot, or return None and count a refusal if there is none."""
        slot = self._slots.allocate()
        self.stats.refusals += slot is None
        return slot

    def take_step(self) -> StepPlan:
        """Return the work that is due before the next step: moves and row writes."""
        return self.steps.take()

    def free_kv(self, kv_indices: Indices) -> None:
        self._pages.free(kv_indices)

    def free_slot(self, slot: int) -> None:
        self._slots.free(slot)

    def evict(self, num_tokens: int = 0, num_slots: int = 0) -> Eviction:
        """Free nothing."""
        return Eviction(0, 0)

    def reset(self) -> None:
        """Forget a plan that was not carried out: nothing is cached."""
        self.steps.forget_open_plan()

    def subscribe(self, listener: Listener) -> None:
        """Do nothing: there are no changes to report."""

    def unsubscribe(self, listener: Listener) -> None:
        return None

    def render(self, max_nodes: int = 1000) -> str:
        """There is no tree: the empty picture."""
        return ""

    def check(self, held_tokens: int | None = None, held_slots: int | None = None) -> None:
        self._pages.check()
        self._slots.check()
        assert held_tokens is None or self._pages.num_taken == held_tokens, "KV rows leaked"
        assert held_slots is None or self._slots.num_taken == held_slots, "slots leaked"
