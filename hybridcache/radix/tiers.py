"""Cache that offloads evicted entries to host memory and disk (``hybridcache.radix.offload``)."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from hybridcache.allocators.moves import DEVICE, Indices
from hybridcache.radix.api import PrefixMatch, Resumable
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.offload import OffloadTiers, Tier
from hybridcache.radix.protocol import Placed
from hybridcache.radix.tokens import Tokens, require_int32
from hybridcache.radix.tree import Checkpoint, OffloadedCheckpoint, RadixNode, tier_of


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
    >>> cache.load(match.loadable[0]), cache.match(prompt).cached_len
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
    """True during ``load``: listeners are notified before the bytes have arrived."""

    def attach(self, tiers: tuple[Tier, ...], state_rows: int) -> None:
        """Use ``tiers``, the nearest first, in which a state takes ``state_rows`` rows. The cache
        must be empty."""
        self.offload = self.ghosts = OffloadTiers(
            self.ghosts, self.steps, tiers, self.item_bytes.kv_token, state_rows
        )

    def load(self, resumable: Resumable) -> bool:
        """Load ``resumable``, of the latest ``match``, to the device. Returns False if there is no
        room.

        The new rows are valid at once; the bytes follow with the next ``take_step``. O(tokens
        loaded), plus evictions that make room.
        """
        target, offload = resumable.node, self.offload
        state = None if target.offloaded is None else target.offloaded.state
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
                self._make_resident(state, path[::-1], rows, slot)
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

    def _make_resident(
        self, state: OffloadedCheckpoint, path: list[RadixNode], rows: Indices, slot: int
    ) -> None:
        """Make the ghosts of ``path`` resident in ``rows``, and ``state`` in ``slot``."""
        offload, start, target = self.offload, 0, state.node
        base = path[0].parent if path else None
        if base is not None and base.kv is not None and base.children is None:
            self._withdraw(base.kv)
        for node in path:
            end = start + node.end - node.start
            entry = node.offloaded
            assert entry is not None and entry.kv is not None
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
        self._store_checkpoint(target, slot, state, not path)
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
        self, node: RadixNode, slot: int, what: Placed | Checkpoint, offered: bool
    ) -> None:
        """Free the offloaded state of ``node``, which is on the device again."""
        if node.offloaded is not None:
            self.offload.drop_state(node)
        super()._store_checkpoint(node, slot, what, offered)

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
        while tier_of(known) is None:
            assert known.parent is not None
            known = known.parent
        start = min(known.end, length)
        # A resident node may have an entry for its children. Its ``kv_tier`` is undefined.
        entry = known.offloaded
        too_low = entry is not None and entry.kv is not None and entry.kv_tier > number
        state = last.checkpoint or (None if last.offloaded is None else last.offloaded.state)
        is_known = state is not None and last.end == length == len(tokens)
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
            was = Checkpoint(target, -1, self.now, self.num_items, self.item_bytes)
            self.num_items += 1
        stored = was.stored = OffloadedCheckpoint(was, number, state_rows)
        offload.entry(target).state = stored
        offload.tiers[number].policy.add(stored)
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
