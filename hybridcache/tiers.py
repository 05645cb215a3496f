"""Offload tiers: host memory and disk for entries evicted from the device.

An entry evicted from one tier is offered to the next. The tree keeps its shape: a node that left
the device is a tombstone or a ghost, and its KV and state can be in a lower tier
(``RadixNode.offloaded``). Each is in one tier only: when it is loaded or computed again on the
device, it leaves its tier.

A tier consists of rows, which never move. The KV of a token takes one row; a state takes as many as
hold its bytes. Rules:

- If KV is in tier t, the KV of its parent is in t or nearer. So a path can be resumed wherever its
  parts are.
- KV stays in a tier only if a state of that tier or nearer, at its node or deeper, needs it. So the
  policy of a tier orders states, and KV follows them. When the last such state moves down, the KV
  moves with it; when that state is dropped, the KV is freed.
- An offered state is a candidate at once. It is stored unless the policy of the tier chooses it as
  the victim. So the eviction policy also decides admission.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np

from hybridcache.allocators.moves import DEVICE, DISK, Copy, Drop
from hybridcache.allocators.pools import PageAllocator, are_distinct
from hybridcache.api import PrefixMatch, Resumable
from hybridcache.cache import HybridRadixCache
from hybridcache.policies.protocol import EvictionPolicy, raise_failure
from hybridcache.radix.tree import ENDED, Checkpoint, GhostList, Kind, RadixNode, members
from hybridcache.tokens import EMPTY, Indices, Tokens, require_int32


class OffloadedEntry:
    """Offloaded parts of one node. Tiers are numbered from the nearest, 0."""

    __slots__ = ("kv", "kv_tier", "num_children", "state")

    def __init__(self, num_tiers: int) -> None:
        self.kv: Indices | None = None
        """Rows of the edge in tier ``kv_tier``, or None. Only ghosts have offloaded KV."""
        self.kv_tier = 0
        self.state: OffloadedCheckpoint | None = None
        """Offloaded state, or None if the checkpoint is on the device or does not exist."""
        self.num_children = [0] * num_tiers
        """Number of ghosts below this node with KV in each tier."""

    @property
    def nearest(self) -> int | None:
        """Nearest tier with an entry that needs the KV of this node, or None. O(tiers)."""
        for tier, num_children in enumerate(self.num_children):
            if num_children or (self.state is not None and self.state.tier == tier):
                return tier
        return None


def is_superseded(item: Checkpoint) -> bool:
    """Return whether a state, on the device or offloaded, is on the unforked path below ``item``,
    or that path is the rest of an ended session. O(nodes to it)."""
    node = item.node
    while True:
        resident, entry = members(node.children), node.offloaded
        num_stored = 0 if entry is None else sum(entry.num_children)
        if len(resident) + num_stored != 1:
            return not (resident or num_stored) and item.label.endswith(ENDED)
        stored = (ghost for ghost in members(node.ghosts) if _place(ghost) is not None)
        node = next(chain(resident, stored))
        if node.checkpoint is not None or (node.offloaded and node.offloaded.state):
            return True


def _next_state(node: RadixNode) -> RadixNode | None:
    """Return the nearest node above ``node`` with a state, on the device or offloaded.
    O(nodes between)."""
    above = node.parent
    while above is not None and above.checkpoint is None:
        if above.offloaded is not None and above.offloaded.state is not None:
            break
        above = above.parent
    return above


class OffloadedCheckpoint(Checkpoint):
    """State in an offload tier. It has no slot.

    ``superseded`` is updated only when this item or a deeper one is stored, and before it is
    evicted.
    """

    __slots__ = ("rows", "tier")

    def __init__(self, was: Checkpoint, tier: int, rows: Indices) -> None:
        """Make the item for ``was`` in ``tier``, with its uses and age but without its memo."""
        super().__init__(was.node, -1, was.created, was.serial, was.item_bytes, was.label)
        self.last_used, self.uses = was.last_used, was.uses
        self.superseded = is_superseded(was)
        self.tier = tier
        self.rows = rows
        """Rows of its tier. Empty until there is room for them."""

    @property
    def above(self) -> OffloadedCheckpoint | None:
        """Nearest item above in the same tier. O(nodes between)."""
        above = self.node.parent
        while above is not None:
            entry: OffloadedEntry | None = above.offloaded
            if entry is not None and entry.state is not None and entry.state.tier == self.tier:
                return entry.state
            above = above.parent
        return None

    predecessor = above

    @property
    def span(self) -> int:
        """Number of tokens back to the nearest state above, in any tier. O(nodes between)."""
        above = _next_state(self.node)
        return self.node.end - (0 if above is None else above.end)

    @property
    def size_bytes(self) -> int:
        """Bytes of its state, and of the KV that its tier holds for it alone. O(nodes of it)."""
        node, item_bytes = self.node, self.item_bytes
        if node.kv is not None:
            # It has just left the device: where it was a leaf, its tail is about to follow.
            return super().size_bytes
        num_tokens, tier = 0, self.tier
        entry = node.offloaded
        while entry is not None and entry.kv is not None and entry.kv_tier == tier:
            if any(entry.num_children[: tier + 1]) and num_tokens == 0:
                break
            assert node.parent is not None
            num_tokens += node.end - node.parent.end
            node = node.parent
            entry = node.offloaded
            if entry is None or entry.num_children[tier] > 1:
                break
            if entry.state is not None and entry.state.tier <= tier:
                break
        return item_bytes.state + num_tokens * item_bytes.kv_token

    def span_and_size(self) -> tuple[int, int]:
        return self.span, self.size_bytes

    def __lt__(self, other: object) -> bool:
        """Return False, because a state that is stored again has the serial of its first item,
        which a policy's heap may still hold."""
        return False

    __gt__ = __lt__

    def __repr__(self) -> str:
        return f"<state in tier {self.tier} at {self.node.end} used={self.last_used}>"


class Tier(NamedTuple):
    """One offload tier, with the allocator of its rows and the eviction policy of its states."""

    name: str
    pages: PageAllocator
    policy: EvictionPolicy
    is_shared: bool = False
    """True if the policy shares the learned state of the device's (``EvictionPolicy.for_tier``).
    Then only the device's is notified of uses and ghost hits, and items keep their memos."""


class OffloadTiers(GhostList):
    """Offloaded KV and states of one cache, and its other ghosts, of which only tokens remain.

    Every change adds a transfer to the next ``StepPlan``; the new row numbers are valid at once. An
    eviction costs O(log of the tier) in its policy, plus O(1) per node that moves with it.
    """

    def __init__(self, cache: HybridRadixCache, tiers: tuple[Tier, ...], state_rows: int) -> None:
        """Use ``tiers`` for the new ``cache``. A state takes ``state_rows`` rows."""
        super().__init__(cache.ghosts.tree, cache.ghosts.limit_bytes)
        self.tiers = tiers
        self.names = tuple(tier.name for tier in tiers)
        """Names of the tiers, the nearest first."""
        self.state_rows = state_rows
        self.row_bytes = cache.item_bytes.kv_token
        self._steps = cache.steps
        self.loading: OffloadedCheckpoint | None = None
        """State that ``fetch`` is loading: no candidate of its tier. None if it was dropped."""
        self.closed: set[int] = set()
        """Numbers of the tiers to which nothing is offloaded now."""
        self.copied_rows: dict[tuple[str, str], int] = {}
        """Rows copied so far, by (source tier, destination tier)."""

    def add(self, ghost: RadixNode, rows: Indices = EMPTY) -> None:
        """Offer ``rows``, of which the KV is still there, to the tiers; list ``ghost`` if they do
        not take it."""
        if not len(rows) or not self.add_kv(ghost, rows):
            super().add(ghost)

    def discard(self, path: Iterable[RadixNode]) -> None:
        """Free the offloaded KV of the ghosts of ``path``, or remove them from the list."""
        super().discard([ghost for ghost in path if not self.drop_kv(ghost)])

    def split(self, upper: RadixNode, lower: RadixNode) -> None:
        """Give ``upper``, the new upper part of the ghost ``lower``, its part of the offloaded KV,
        or add it to the list. O(tokens)."""
        entry = lower.offloaded
        if entry is None or entry.kv is None:
            super().split(upper, lower)
            return
        cut = upper.end - upper.start
        above = self.entry(upper)
        above.kv, above.kv_tier = entry.kv[:cut].copy(), entry.kv_tier
        above.num_children[entry.kv_tier] = 1
        entry.kv = entry.kv[cut:].copy()

    def loadable(
        self, deepest: RadixNode, cached_len: int, num_tokens: int
    ) -> tuple[Resumable, ...]:
        """Return the positions past ``cached_len`` on the path to ``deepest`` that could be loaded.
        O(nodes)."""
        path = []
        for tier in self.tiers:
            if tier.policy.failure is not None:
                raise_failure(tier.policy.failure)
        while deepest.parent is not None and deepest.end > cached_len:
            path.append(deepest)
            deepest = deepest.parent
        loadable, num_rows = [], [0] * len(self.tiers)
        for node in reversed(path):
            entry: OffloadedEntry | None = node.offloaded
            if node.kv is None:
                if entry is None or entry.kv is None:
                    break
                num_rows[entry.kv_tier] += len(entry.kv)
            if entry is not None and entry.state is not None and node.end < num_tokens:
                rows = list(num_rows)
                rows[entry.state.tier] += self.state_rows
                num_bytes = [num * self.row_bytes for num in rows]
                by_tier = dict(zip(self.names, num_bytes, strict=True))
                loadable.append(Resumable(node.end, node, by_tier))
        return tuple(loadable)

    def add_state(self, was: Checkpoint, first: int, src_tier: str, src: Indices) -> None:
        """Store the state of ``was``, which is leaving ``src_tier``, in tier ``first`` or a lower
        one, unless none takes it."""
        node = was.node
        for number in range(first, len(self.tiers)):
            if number in self.closed:
                continue
            tier = self.tiers[number]
            state = OffloadedCheckpoint(was, number, EMPTY)
            if tier.is_shared:
                state.memo = was.memo
            entry = self.entry(node)
            entry.state = state
            tier.policy.add(state)
            while (rows := tier.pages.allocate(self.state_rows)) is None:
                victim = self._victim(number)
                if victim is None or victim is state:
                    break
                self._evict(victim)
            if rows is not None:
                state.rows = rows
                self.copy("checkpoint", src_tier, src, tier.name, rows, node)
                above = _next_state(node)  # superseded now, unless the path forks
                if above is not None and above.checkpoint is None:
                    self._review(above.offloaded.state)
                return
            tier.policy.discard(state, evicted=True)
            entry.state = None

    def add_kv(self, node: RadixNode, src: Indices, src_tier: str = DEVICE) -> bool:
        """Store the KV of ``node``, which is leaving ``src_tier``, in the nearest tier that needs
        it.

        Returns False if none needs it, or if there is no room. Then the states that need it are
        dropped too.
        """
        while node.offloaded is not None and (number := node.offloaded.nearest) is not None:
            tier, is_closed = self.tiers[number], number in self.closed
            if not is_closed and (rows := tier.pages.allocate(len(src))) is not None:
                self.hold_kv(node, number, rows)
                self.copy("kv", src_tier, src, tier.name, rows, node)
                return True
            victim = None if is_closed else self._victim(number)
            if victim is None:
                self._prune(node)
                break
            self._evict(victim)
        return False

    def _victim(self, number: int) -> OffloadedCheckpoint | None:
        """Return the next victim of tier ``number``, after updating which states are superseded."""
        policy = self.tiers[number].policy
        while (item := policy.victim("checkpoint")) is not None:
            assert isinstance(item, OffloadedCheckpoint)
            if not self._review(item):
                return item
        return None

    def _review(self, state: OffloadedCheckpoint) -> bool:
        """Update whether ``state`` is superseded, notify its policy, and return whether that
        changed."""
        superseded = is_superseded(state)
        if superseded == state.superseded:
            return False
        if state is self.loading:
            state.superseded = superseded
            return True
        policy = self.tiers[state.tier].policy
        policy.discard(state, evicted=False)
        state.superseded = superseded
        policy.add(state)
        return True

    def _evict(self, item: OffloadedCheckpoint) -> None:
        """Move ``item``, the victim of its tier, one tier down, or drop it. KV needed by it alone
        follows."""
        node, number = item.node, item.tier
        tier, entry = self.tiers[number], node.offloaded
        assert entry is not None and entry.state is item
        tier.policy.discard(item, evicted=True)
        entry.state = None
        self.add_state(item, number + 1, tier.name, item.rows)
        self._release(number, item.rows)
        self._sink(node, number)

    def _sink(self, node: RadixNode, number: int) -> None:
        """Walk up from ``node``, and demote or free KV that nothing in tier ``number`` needs any
        more."""
        above: RadixNode | None = node
        while above is not None:
            node, above = above, above.parent
            entry = node.offloaded
            if entry is None or entry.kv is None or entry.kv_tier != number:
                return
            nearest = entry.nearest
            if nearest is not None and nearest <= number:
                return
            rows = entry.kv
            self._let_go_of_kv(node)
            if not self.add_kv(node, rows, self.names[number]):
                self._prune(node)
                super().add(node)
            self._release(number, rows)

    def _prune(self, node: RadixNode) -> None:
        """Free everything offloaded at ``node`` and deeper, except for its own KV."""
        found = [node]
        for one in found:
            found += [child for child in members(one.ghosts) if child.offloaded is not None]
        for one in reversed(found):
            self.drop_state(one)
            if one is not node and self.drop_kv(one):
                super().add(one)

    def drop_state(self, node: RadixNode) -> None:
        """Free the offloaded state of ``node``: it is on the device again, or cannot be resumed
        from."""
        entry = node.offloaded
        if entry is None or entry.state is None:
            return
        state = entry.state
        if state is self.loading:
            self.loading = None
        else:
            self.tiers[state.tier].policy.discard(state, evicted=False)
        entry.state = None
        self._release(state.tier, state.rows)

    def drop_kv(self, node: RadixNode) -> bool:
        """Free the offloaded KV of ``node``. Returns False if it has none."""
        entry = node.offloaded
        if entry is None or entry.kv is None:
            return False
        number, rows = entry.kv_tier, entry.kv
        self._let_go_of_kv(node)
        self._release(number, rows)
        return True

    def drop_lost(self, name: str, is_lost: Callable[[Indices], bool]) -> None:
        """Remove entries that the tier ``name`` can no longer read, with those that depend on them.

        ``is_lost`` is called with the rows of one state, or of the KV of one node. Call it only if
        no transfers are pending, because rows that a transfer is about to fill are not lost.
        O(tree).
        """
        number = self.names.index(name)
        for node in list(self.tree.nodes()):  # parents first
            entry = node.offloaded
            if entry is None:
                continue
            state, rows = entry.state, entry.kv
            if rows is not None and entry.kv_tier == number and is_lost(rows):
                self._let_go_of_kv(node)
                self._prune(node)
                super().add(node)
                self._release(number, rows)
                assert node.parent is not None
                self._sink(node.parent, number)
            elif state is not None and state.tier == number and is_lost(state.rows):
                self.drop_state(node)
                self._sink(node, number)
        self.trim()

    def clear(self) -> None:
        """Free everything, and forget all ghosts. O(stored + ghosts)."""
        for node in reversed(list(self.tree.nodes())):
            self.drop_state(node)
            if self.drop_kv(node):
                super().add(node)
        super().clear()

    def entry(self, node: RadixNode) -> OffloadedEntry:
        entry: OffloadedEntry | None = node.offloaded
        if entry is None:
            entry = node.offloaded = OffloadedEntry(len(self.tiers))
        return entry

    def hold_kv(self, node: RadixNode, number: int, rows: Indices) -> None:
        """Attach ``rows`` of tier ``number`` to ``node``, a ghost."""
        entry, parent = self.entry(node), node.parent
        assert entry.kv is None and parent is not None
        entry.kv, entry.kv_tier = rows, number
        self.entry(parent).num_children[number] += 1

    def _let_go_of_kv(self, node: RadixNode) -> None:
        """Detach the rows of ``node``. The caller then owns them."""
        entry, parent = node.offloaded, node.parent
        assert entry is not None and parent is not None and parent.offloaded is not None
        entry.kv = None
        parent.offloaded.num_children[entry.kv_tier] -= 1

    def _release(self, number: int, rows: Indices) -> None:
        tier = self.tiers[number]
        tier.pages.free(rows)
        if tier.name == DISK:
            self._steps.transfers.append(Drop(DISK, rows))

    def copy(
        self, kind: Kind, src_tier: str, src: Indices, dst_tier: str, dst: Indices, node: RadixNode
    ) -> None:
        """Put a copy of the KV of ``node``, or of the state at its end, into the next plan."""
        num_rows = len(src) if kind == "kv" else self.state_rows
        key = src_tier, dst_tier
        self.copied_rows[key] = self.copied_rows.get(key, 0) + num_rows
        path = path_of(node) if dst_tier == DISK else None
        self._steps.transfers.append(
            Copy(kind, src_tier, src.copy(), dst_tier, dst.copy(), node.end, path)
        )

    def check(self) -> None:
        """Recompute the invariants of the tiers from scratch. O(tree + pools)."""
        stored: list[list[Indices]] = [[] for _ in self.tiers]
        states: list[list[OffloadedCheckpoint]] = [[] for _ in self.tiers]
        for node in (*self.tree.roots.values(), *self.tree.nodes()):
            places = [_place(child) for child in members(node.ghosts)]
            counts = [places.count(number) for number in range(len(self.tiers))]
            entry: OffloadedEntry | None = node.offloaded
            if entry is None:
                assert not any(counts), f"{node} does not know of {counts} children below"
                continue
            assert entry.num_children == counts, f"{node} has {counts} children below: {entry}"
            place, state = _place(node), entry.state
            if entry.kv is not None:
                assert node.kv is None, f"the KV of {node} is on the device and below"
                assert len(entry.kv) == node.end - node.start, f"{node} has {len(entry.kv)} rows"
                above = None if node.parent is None else _place(node.parent)
                is_near = above is not None and above <= entry.kv_tier
                assert is_near, f"{node.parent} lies further than {node}"
                is_needed = entry.nearest is not None and entry.nearest <= entry.kv_tier
                assert is_needed, f"nothing needs the KV of {node} as near as it is"
                stored[entry.kv_tier].append(entry.kv)
            if state is not None:
                assert node.checkpoint is None, f"the state of {node} is on the device and below"
                assert state.node is node, f"{state} belongs elsewhere"
                assert place is not None and place <= state.tier, f"{state} is nearer than its KV"
                assert len(state.rows) == self.state_rows, f"{state} has {len(state.rows)} rows"
                stored[state.tier].append(state.rows)
                states[state.tier].append(state)
        for tier, parts, held in zip(self.tiers, stored, states, strict=True):
            tier.pages.check()
            both = np.concatenate([*parts, tier.pages.free_rows()])
            is_whole = are_distinct(both) and len(both) == tier.pages.capacity
            assert is_whole, f"a row of {tier.name} is stored twice, or and free, or lost"
            listed = tier.policy.candidates()
            if listed is not None:
                known = list(listed)
                is_same = len(known) == len(held) and set(known) == set(held)
                assert is_same, f"{tier.name} orders other states than it holds"


ON_DEVICE = -1
"""Number of the device; tiers are numbered from the nearest, 0."""


def _place(node: RadixNode) -> int | None:
    """Return the number of the tier that holds the KV of ``node``, or None."""
    if node.kv is not None or node.parent is None:
        return ON_DEVICE
    entry: OffloadedEntry | None = node.offloaded
    return entry.kv_tier if entry is not None and entry.kv is not None else None


def path_of(node: RadixNode) -> tuple[Hashable, Tokens]:
    """Return (namespace, tokens from the root to the end of ``node``). O(position)."""
    parts = []
    while node.parent is not None:
        parts.append(node.tokens)
        node = node.parent
    return node.key, np.concatenate(parts[::-1])


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
    >>> match.cached_len, [(one.position, one.num_bytes) for one in match.loadable]
    (0, [(8, {'host': 24})])
    >>> cache.fetch(match.loadable[0]), cache.match(prompt).cached_len
    (True, 8)

    The next step plan has the copies in both directions:

    >>> plan = cache.take_step()
    >>> [(copy.kind, copy.src_tier, copy.dst_tier) for copy in plan.transfers]
    ... # doctest: +NORMALIZE_WHITESPACE
    [('checkpoint', 'device', 'host'), ('kv', 'device', 'host'),
     ('kv', 'host', 'device'), ('checkpoint', 'host', 'device')]
    >>> plan.done()
    >>> cache.check(held_tokens=0, held_slots=0)
    """

    offload: OffloadTiers
    """Host and disk tiers."""
    ghosts: OffloadTiers
    """The same object: nodes with evicted KV."""
    is_loading: bool = False
    """True during ``fetch``: listeners are notified before the bytes have arrived."""

    def attach(self, tiers: tuple[Tier, ...], state_rows: int) -> None:
        """Use ``tiers``, the nearest first, in which a state takes ``state_rows`` rows. The cache
        must be empty."""
        self.offload = self.ghosts = OffloadTiers(self, tiers, state_rows)

    def fetch(self, resumable: Resumable) -> bool:
        """Load ``resumable``, of the latest ``match``, to the device. Returns False if there is no
        room.

        The new rows are valid at once; the bytes follow with the next ``take_step``. O(tokens
        loaded), plus evictions that make room.
        """
        target, offload = resumable.node, self.offload
        state = target.offloaded.state
        if state is None:
            return False
        if target.lost_checkpoint is not None:
            self.policy.on_ghost_hit(target.lost_checkpoint)
        base, path = target, []
        while base.kv is None and base.parent is not None:
            path.append(base)
            base = base.parent
        tier, state.last_used = offload.tiers[state.tier], self.now + 1
        state.uses += 1
        if not tier.is_shared:
            tier.policy.touch(state)
        state.uses -= 1  # The request that resumes from it counts the use.
        with self.lock(base if base.parent is not None else None):
            # It is no candidate while room is made for it on the device.
            tier.policy.discard(state, evicted=False)
            offload.loading, slot = state, None
            try:
                slot = self.allocate_slot()
                rows = None if slot is None else self.allocate_kv(target.end - base.end)
            except BaseException:
                self._give_up(state, slot)
                raise
            is_there = offload.loading is state
            if slot is not None and rows is not None and is_there:
                self.is_loading = True
                self._load(state, path[::-1], rows, slot)
                self.is_loading = False
                return True
            if rows is not None:  # Making room has dropped the state.
                self.free_kv(rows)
            self._give_up(state, slot)
        return False

    def _give_up(self, state: OffloadedCheckpoint, slot: int | None) -> None:
        """Free ``slot`` and make ``state``, which is not loaded, a candidate of its tier again,
        unless it was dropped."""
        if slot is not None:
            self.free_slot(slot)
        if self.offload.loading is state:
            self.offload.loading = None
            self.offload.tiers[state.tier].policy.add(state)

    def _load(
        self, state: OffloadedCheckpoint, path: list[RadixNode], rows: Indices, slot: int
    ) -> None:
        """Make the ghosts of ``path`` resident in ``rows``, and ``state`` in ``slot``."""
        offload, start, target = self.offload, 0, state.node
        base = path[0].parent if path else None
        if base is not None and base.kv is not None and base.children is None:
            self._withdraw(base.kv)
        for node in path:
            end = start + node.end - node.start
            entry: OffloadedEntry = node.offloaded
            assert entry.kv is not None
            tier = offload.names[entry.kv_tier]
            offload.copy("kv", tier, entry.kv, DEVICE, rows[start:end], node)
            offload.drop_kv(node)
            start = end
        self._tree.revive(path)
        if path:
            self._store_rows(path, rows, path[0].start)
        self.cached_tokens += start
        self.stats.inserted_tokens += start
        if base is not None and isinstance(base.children, dict):
            self._review(base)
        dst = np.array([slot], np.int32)
        offload.copy("checkpoint", offload.names[state.tier], state.rows, DEVICE, dst, target)
        self._store_checkpoint(target, slot, state.label, not path, state.uses)
        if path:  # It was a ghost, so it has no resident children.
            assert target.kv is not None
            self.policy.add(target.kv)

    def _drop_checkpoint(self, node: RadixNode) -> None:
        """Offer the checkpoint, which leaves the device, to the tiers, the nearest first."""
        super()._drop_checkpoint(node)
        lost = node.lost_checkpoint
        if lost is not None:
            self.offload.add_state(lost, 0, DEVICE, np.array([lost.slot], np.int32))
            lost.stored = None if node.offloaded is None else node.offloaded.state

    def _store_checkpoint(
        self, node: RadixNode, slot: int, label: str, offered: bool, uses: int = 0
    ) -> None:
        """Free the offloaded state of ``node``, which is on the device again."""
        if node.offloaded is not None:
            self.offload.drop_state(node)
        super()._store_checkpoint(node, slot, label, offered, uses)

    def adopt(
        self, tokens: Tokens, namespace: Hashable = None, tier: str = "disk"
    ) -> tuple[int, Indices, Indices] | None:
        """Register the KV of all ``tokens`` and the state after them, which an earlier process
        stored.

        Returns (start, KV rows of tokens[start:], rows of the state), newly taken in ``tier``, or
        None if they are already known or there is no room. Adds no transfers: the caller fills the
        rows, or reads its own files for them. O(n).

        Raises:
            ValueError: ``tokens`` is not int32[n], n is not a positive multiple of
                ``checkpoint_grid``, or there is no such tier.
        """
        require_int32(tokens, "tokens")
        if not len(tokens) or len(tokens) % self.checkpoint_grid:
            raise ValueError(f"{len(tokens)} tokens do not end on {self.checkpoint_grid}.")
        tree, offload = self._tree, self.offload
        if tier not in offload.names:
            raise ValueError(f"no tier {tier!r}; this cache has: {', '.join(offload.names)}")
        number = offload.names.index(tier)
        pages = offload.tiers[number].pages
        ids = tokens.tobytes()
        node, inside, length = tree.walk(tree.root(namespace), ids, 0)
        if inside is None:
            node, inside, length = tree.walk(node, ids, 0, ghosts=True)
        last = node if inside is None else inside
        known = last
        while _place(known) is None:
            assert known.parent is not None
            known = known.parent
        start = min(known.end, length)
        # A resident node may have an entry for its children. Its ``kv_tier`` is undefined.
        entry = known.offloaded
        too_low = entry is not None and entry.kv is not None and entry.kv_tier > number
        is_known = last.checkpoint or (last.offloaded is not None and last.offloaded.state)
        is_known = is_known and last.end == length == len(tokens)
        num_rows = len(tokens) - start + offload.state_rows
        if too_low or is_known or num_rows > pages.num_free:
            return None
        if last.end > length:
            if last.kv is not None:
                node = self._split(last, length)
            else:
                node = tree.split(last, length)
                self.ghosts.split(node, last)
        if length < len(tokens):
            node = tree.grow(node, tokens[length:].tobytes())
            tree.fade(node)
            self.ghosts.add(node)
        kv_rows = pages.allocate(len(tokens) - start)
        state_rows = pages.allocate(offload.state_rows)
        assert kv_rows is not None and state_rows is not None
        target = node
        while node.end > start:
            self.ghosts.discard((node,))
            rows = kv_rows[node.start - start : node.end - start].copy()
            offload.hold_kv(node, number, rows)
            assert node.parent is not None
            node = node.parent
        was = target.lost_checkpoint  # with the age and uses that a file remembers
        if was is None:
            was = Checkpoint(target, -1, self.now, self.num_items, self.item_bytes, "")
            self.num_items += 1
        state = was.stored = OffloadedCheckpoint(was, number, state_rows)
        offload.entry(target).state = state
        offload.tiers[number].policy.add(state)
        return start, kv_rows, state_rows

    def touch(self, match: PrefixMatch, resumes: bool = False) -> None:
        """Record a use as in ``HybridRadixCache.touch``, and notify the tier that dropped the
        missed entry, unless its policy shares the learned state of the device's."""
        super().touch(match, resumes)
        state = None if match.missed is None else match.missed.stored
        if state is not None and not self.offload.tiers[state.tier].is_shared:
            entry = state.node.offloaded
            if entry is None or entry.state is not state:
                self.offload.tiers[state.tier].policy.on_ghost_hit(state)

    def reset(self) -> None:
        """Remove everything that is not locked, in all tiers. O(tree)."""
        offload = self.offload
        closed, offload.closed = offload.closed, set(range(len(offload.tiers)))
        try:
            super().reset()
        finally:
            offload.closed = closed

    def check(self, held_tokens: int | None = None, held_slots: int | None = None) -> None:
        """Recompute every invariant, those of the tiers included; see ``HybridRadixCache.check``.
        O(tree + pools + tiers)."""
        super().check(held_tokens, held_slots)
        self.offload.check()
