"""What of the tree is resident, what of it may go, and what goes: where tree, allocators and policy
meet.

Rules kept here, each by one method:

- KV is resident on an ancestor-closed part of the tree: only leaves lose it (``drop_leaf``);
- a checkpoint stands only where KV is resident, and leaves a tombstone when it goes from an inner
  node;
- a leaf that loses its last checkpoint loses its KV too, and so does every stateless node above it
  that becomes a leaf: nothing could resume from them;
- a locked node stays with its checkpoint, and so does all KV above it because it is no leaf. The
  lock needs a count only there: O(1);
- the policy holds the candidates: checkpoints, and KV of leaves. One that it chose while it was
  locked is withheld from it until the lock is gone, so that locking and unlocking, done for every
  request, cost the policy nothing.

Recency of KV is kept at the place of use only. When a child goes, its parent takes over the later
last use and the sum of uses: that is what stamping the whole path at every use would have left
there, at the one time when it can matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hybridcache.allocators.pages import PageAllocator
from hybridcache.allocators.slots import SlotAllocator
from hybridcache.core.gathers import GatherCache
from hybridcache.core.locks import NEW, LockedPaths
from hybridcache.core.lower import LowerTiers
from hybridcache.core.owners import RowOwners
from hybridcache.listener import Listener
from hybridcache.policies.protocol import EvictionPolicy, Item, Kind
from hybridcache.radix.compact import compact_rows
from hybridcache.radix.forks import Link, is_last_above, last_above, last_at, link
from hybridcache.radix.ghosts import GhostList
from hybridcache.radix.node import Checkpoint, ItemBytes, RadixNode, Segment
from hybridcache.radix.tree import RadixTree
from hybridcache.stats import CacheStats
from hybridcache.tokens import Indices

NO_ROWS: Indices = np.empty(0, np.int32)


class Residency:
    """State changes of one cache's nodes; the verbs above it decide when."""

    def __init__(
        self,
        pages: PageAllocator,
        slots: SlotAllocator,
        policy: EvictionPolicy,
        item_bytes: ItemBytes,
        ghost_bytes: int,
        stats: CacheStats,
    ) -> None:
        self.tree = RadixTree(pages.page_size)
        self.ghosts = GhostList(self.tree, ghost_bytes)
        self.gathered = GatherCache()
        self.pages = pages
        self.owners: RowOwners | None = None
        """Where rows can move: who owns each."""
        if pages.arena is not None:
            self.owners = RowOwners(pages.capacity, self.gathered)
            pages.arena.holders[self.owners] = None
        self.slots = slots
        self.policy = policy
        self.item_bytes = item_bytes
        self.stats = stats
        self.lower: LowerTiers | None = None
        """Where what is evicted may go; None costs a comparison."""
        self.listener: Listener | None = None
        """Notified of every change; None costs a comparison."""
        self.now = 0
        """Logical time: requests so far."""
        self.num_items = 0
        """Items ever made: the next serial."""
        self.cached_tokens = 0
        self.num_checkpoints = 0
        self.locked_paths = LockedPaths()
        self.locked = self.locked_paths.nodes
        self.withheld: set[Checkpoint | Segment] = set()
        """Locked candidates that the policy chose and must not know until they are unlocked."""
        self.locked_path_tokens = 0
        """Sum of the locked nodes' positions: an upper bound of the KV under locks."""

    def store_rows(self, node: RadixNode, rows: Indices) -> None:
        """``node`` becomes resident with ``rows``, which pass to the cache, array and all.
        ``offer_leaf`` is owed if it stays a leaf."""
        serial, num_tokens = self.num_items, len(rows)
        self.num_items = serial + 1
        node.kv = Segment(node, rows, self.now, serial, self.item_bytes)
        if self.owners is not None:
            self.owners.add(rows)
        self.cached_tokens += num_tokens
        self.stats.inserted_tokens += num_tokens
        if self.listener is not None:
            self.listener.kv_stored(node)

    def expect_child(self, parent: RadixNode) -> None:
        """To be called before ``parent`` gains a resident child: it is no leaf any more, or its
        path forks."""
        family = parent.children
        if isinstance(family, dict) or parent.parent is None:
            return
        if family is not None:
            before = last_at(parent)
            below = before.deeper
            if below is not None:
                before.deeper = None
                link(family, below)
                if isinstance(before, Checkpoint):
                    self._set_superseded(before, False)
        elif parent.kv is not None:
            self._withdraw(parent.kv)

    def offer_leaf(self, leaf: RadixNode) -> None:
        """Tell the policy of a leaf that has just become resident."""
        if leaf.kv is not None and not leaf.children:
            self.policy.add(leaf.kv)

    def split(self, lower: RadixNode, position: int) -> RadixNode:
        """Split with the KV rows: two views of one array. O(page)."""
        upper = self.tree.split(lower, position)
        kv = lower.kv
        if kv is None:
            if self.lower is None or not self.lower.split(upper, lower):
                self.ghosts.shrink(len(upper.edge))
            return upper
        if lower.deeper is not None:
            link(upper, lower.deeper)
            lower.deeper = None
        if lower.pins:
            upper.pins = 1
        cut = position - upper.start
        upper.kv = Segment(upper, kv.indices[:cut], kv.created, self.num_items, self.item_bytes)
        self.num_items += 1
        kv.indices = kv.indices[cut:]
        if self.listener is not None:
            self.listener.kv_split(upper, lower)
        return upper

    def revive(self, ghost: RadixNode, rows: Indices) -> None:
        """A ghost's tokens came again with ``rows``. ``offer_leaf`` is owed if it stays a leaf."""
        if self.lower is not None and self.lower.is_stored(ghost):
            self.lower.drop_kv(ghost)
        else:
            self.ghosts.discard(ghost)
        self.tree.revive(ghost)
        self.store_rows(ghost, rows)

    def store_checkpoint(
        self,
        node: RadixNode,
        slot: int,
        label: str,
        offered: bool,
        before: Link | None = None,
        uses: int = 0,
    ) -> Link:
        """``slot`` becomes ``node``'s checkpoint, used ``uses`` times before. ``offered``: the
        policy knows ``node``'s KV if it is a leaf.

        Returns what it follows in its run, for the next checkpoint above it to be given as
        ``before``: else each of many that come together would look for it past all the others'
        places. O(1) with it, else O(nodes up to it).
        """
        serial = self.num_items
        self.num_items = serial + 1
        checkpoint = Checkpoint(node, slot, self.now, serial, self.item_bytes, label)
        checkpoint.uses = uses
        self.num_checkpoints += 1
        self.stats.inserted_slots += 1
        revives = node.kv if offered and not node.children else None
        if revives is not None:
            self._withdraw(revives)
        if before is None or not is_last_above(before, node):
            before = last_above(node)
        below = before.deeper
        if below is not None:
            checkpoint.superseded = True
            link(checkpoint, below)
        before.deeper = checkpoint
        checkpoint.shallower = before
        if type(before) is Checkpoint and below is None:
            self._set_superseded(before, True)
        node.checkpoint = checkpoint
        if node.locks:
            self.locked_paths.checkpoint_stored(node)
        node.lost_checkpoint = None
        if node.below is not None and self.lower is not None:
            self.lower.drop_state(node)
        self.policy.add(checkpoint)
        if revives is not None:
            self.policy.add(revives)
        if self.listener is not None:
            self.listener.checkpoint_stored(node)
        return before

    def evict_one(self, kind: Kind | None) -> bool:
        """Let the policy's victim go; False if nothing evictable is left. Amortised O(log n) an
        item freed."""
        while True:
            item = self.policy.victim(kind)
            if item is None:
                return False
            node: RadixNode = item.node  # type: ignore[attr-defined]
            if not node.locks:
                break
            self.policy.discard(item, evicted=False)
            self.withheld.add(item)  # type: ignore[arg-type]
        self.stats.evictions += 1
        if self.listener is not None:
            self.listener.chosen(item)
        if item.kind == "checkpoint" and node.children:
            self._drop_checkpoint(node)
        else:
            self._drop_leaf(node)
        if self.ghosts.num_bytes > self.ghosts.limit_bytes:
            self.ghosts.trim()
        return True

    def _drop_checkpoint(self, node: RadixNode) -> None:
        """Free an unlocked node's checkpoint; the evicted item stays with the node for as long as
        its tokens do."""
        checkpoint = node.checkpoint
        assert checkpoint is not None
        if self.listener is not None:
            self.listener.checkpoint_removed(node)
        self.policy.discard(checkpoint, evicted=True)
        before, below = checkpoint.shallower, checkpoint.deeper
        assert before is not None
        before.deeper = below
        if below is not None:
            below.shallower = before
        elif type(before) is Checkpoint:
            self._set_superseded(before, False)
        checkpoint.shallower = checkpoint.deeper = None
        node.checkpoint = None
        node.lost_checkpoint = checkpoint
        self.num_checkpoints -= 1
        self.stats.evicted_slots += 1
        if self.lower is not None:
            self.lower.spill_state(node, checkpoint)
        self.slots.free(checkpoint.slot)

    def _drop_leaf(self, leaf: RadixNode) -> None:
        """Free an unlocked leaf's KV and checkpoint, and the stateless nodes above that nothing can
        resume from then."""
        assert leaf.kv is not None
        self.policy.discard(leaf.kv, evicted=True)
        stateful = self.item_bytes.state > 0
        while True:
            if leaf.checkpoint is not None:
                self._drop_checkpoint(leaf)
            parent = self._fade(leaf)
            only = parent.children
            if only is not None:
                if not isinstance(only, dict) and parent.parent is not None:
                    self._join_runs(parent, only)
                return
            if parent.kv is None:
                return
            if parent.checkpoint is not None or parent.locks or not stateful:
                self.policy.add(parent.kv)
                return
            leaf = parent

    def _join_runs(self, parent: RadixNode, only: RadixNode) -> None:
        """The path forks no more between ``parent`` and ``only``, the child that it has left.
        O(nodes up to a checkpoint)."""
        below = only.deeper
        if below is None:
            return
        only.deeper = None
        before = last_at(parent)
        link(before, below)
        if isinstance(before, Checkpoint):
            self._set_superseded(before, True)

    def _fade(self, leaf: RadixNode) -> RadixNode:
        """Turn a leaf into a ghost, free its rows, hand its recency up; returns the parent."""
        kv, parent = leaf.kv, leaf.parent
        assert kv is not None and parent is not None
        if self.listener is not None:
            self.listener.kv_removed(leaf)
        rows = kv.indices
        self.pages.release(rows)
        self.cached_tokens = cached_tokens = self.cached_tokens - len(rows)
        self.stats.evicted_tokens += len(rows)
        above, living = parent.kv, None
        if above is not None:
            above.uses += kv.uses
            if kv.last_used > above.last_used:
                above.last_used = kv.last_used
            if rows.base is not None:
                living = compact_rows(parent, rows)
        if self.owners is not None:
            self.owners.shrink(rows, living)
        gathered = self.gathered
        if kv in gathered.rows:
            gathered.discard(kv)
        if gathered.num_rows > cached_tokens:
            gathered.trim(cached_tokens)
        if leaf.pins:
            self.locked_paths.forget(leaf)
        leaf.kv = None
        kv.indices = NO_ROWS  # a policy's queue may hold the segment for a while yet
        self.tree.fade(leaf)
        if leaf.below is None or self.lower is None or not self.lower.spill_kv(leaf, rows):
            self.ghosts.add(leaf)
        return parent

    def _set_superseded(self, checkpoint: Checkpoint, superseded: bool) -> None:
        if checkpoint.superseded == superseded:
            return
        if checkpoint in self.withheld:
            checkpoint.superseded = superseded
            return
        self.policy.discard(checkpoint, evicted=False)
        checkpoint.superseded = superseded
        self.policy.add(checkpoint)

    def use(self, node: RadixNode) -> None:
        """A request resumed at the end of ``node``: refresh its checkpoint and its KV, none above.
        O(1)."""
        now, policy = self.now, self.policy
        checkpoint = node.checkpoint
        if checkpoint is not None:
            checkpoint.last_used = now
            checkpoint.uses += 1
            if checkpoint not in self.withheld:
                policy.touch(checkpoint)
        kv = node.kv
        if kv is not None:
            kv.last_used = now
            kv.uses += 1
            if not node.children and kv not in self.withheld:
                policy.touch(kv)

    def lock(self, node: RadixNode) -> None:
        """Protect ``node``, its checkpoint and all KV above it. O(1)."""
        node.locks += 1
        if node.locks == 1:
            self.locked[node] = NEW
            self.locked_path_tokens += node.end

    def unlock(self, node: RadixNode) -> None:
        """Undo one ``lock``. O(1)."""
        node.locks -= 1
        if node.locks:
            return
        how = self.locked.pop(node)
        if how:
            self.locked_paths.released[node] = how
        self.locked_path_tokens -= node.end
        if self.withheld:
            for item in (node.checkpoint, node.kv):
                if item in self.withheld:
                    self.withheld.discard(item)
                    self.policy.add(item)

    def _withdraw(self, item: Checkpoint | Segment) -> None:
        """``item`` is no candidate any more."""
        if item in self.withheld:
            self.withheld.discard(item)
        else:
            self.policy.discard(item, evicted=False)

    def mark_superseded(self) -> None:
        """Link the checkpoints of every run, and tell which are superseded, before the policy knows
        any. O(tree)."""
        for node in self.tree.nodes():
            if node.checkpoint is not None:
                before = last_above(node)
                link(before, node.checkpoint)
                if isinstance(before, Checkpoint):
                    before.superseded = True

    def candidates(self) -> Iterator[Item]:
        """What the policy must hold, found from scratch. O(tree)."""
        for node in self.tree.nodes():
            if node.checkpoint is not None and node.checkpoint not in self.withheld:
                yield node.checkpoint
            if node.kv is not None and not node.children and node.kv not in self.withheld:
                yield node.kv
