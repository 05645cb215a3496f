"""State transitions of the cache: insert, lock, make room, evict.

``Residency`` owns the tree, the allocators and the eviction policy of one cache. Rules:

- KV is resident on an ancestor-closed part of the tree: only leaves lose it (``_drop_leaf``).
- A checkpoint exists only where KV is resident. Evicted from an inner node, it leaves a tombstone.
- A leaf that loses its last checkpoint loses its KV too, and so does every stateless node above it
  that becomes a leaf, because nothing could resume from them.
- A locked node keeps its checkpoint. All KV above it stays because it is not in a leaf. So a lock
  needs one counter at its node: O(1).
- The policy holds the candidates: checkpoints, and KV of leaves. A locked victim is withheld from
  it until it is unlocked. So locking and unlocking, done for every request, do not involve the
  policy.

Recency of KV is recorded at the node of the use only. When a child is evicted, its parent takes
over the later last use and the sum of uses. The result is the same as updating the whole path at
every use.

Locked memory is counted lazily (``LockedPaths``), because the sum is needed only if locks may
prevent an allocation. A refused allocation evicts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hybridcache.allocators.arena import arena_of
from hybridcache.allocators.pages import PageAllocator, are_distinct
from hybridcache.allocators.slots import SlotAllocator
from hybridcache.api import CacheStats, Listener, Protected, introduce
from hybridcache.offload import OffloadTiers, check_offload
from hybridcache.policies.protocol import EvictionPolicy, Item, Kind, base_label
from hybridcache.radix.check import check_tree
from hybridcache.radix.checkpoints import Link, is_last_above, last_above, last_at, link
from hybridcache.radix.compact import compact_rows
from hybridcache.radix.ghosts import GhostList
from hybridcache.radix.rows import GatherCache, RowIndex
from hybridcache.radix.tree import Checkpoint, ItemBytes, RadixNode, RadixTree, Segment, members
from hybridcache.tokens import INT32, Indices, Tokens, require_int32

NEW, COUNTED, WITH_CHECKPOINT = range(3)
"""Accounting state of a lock: not counted yet, path counted, path and checkpoint counted."""


class LockedPaths:
    """Count of the memory under locks, shared paths counted once.

    ``RadixNode.pins`` is 1 for a counted lock of the node, plus 1 per pinned child. A node with
    pins is counted once. A lock, or a lock that is returned before ``protected`` is called, needs
    no work. ``protected`` follows each change upward to the first node with another pin: amortised
    O(1) per node.
    """

    __slots__ = ("_num_checkpoints", "_num_tokens", "nodes", "released")

    def __init__(self) -> None:
        self.nodes: dict[RadixNode, int] = {}
        """Locked nodes and their accounting states, the latest last. New ones are behind all
        counted ones."""
        self.released: dict[RadixNode, int] = {}
        """Nodes that are still counted although their lock was returned."""
        self._num_tokens = 0
        self._num_checkpoints = 0

    def protected(self) -> Protected:
        """Return the locked memory. O(nodes locked or unlocked since the last call)."""
        nodes, released = self.nodes, self.released
        for node in reversed(nodes):
            if nodes[node] != NEW:
                break
            self._pin(node)
            nodes[node] = COUNTED
            if node.checkpoint is not None:
                self.checkpoint_stored(node)
        if released:
            for node, how in released.items():
                self._unpin(node)
                self._num_checkpoints -= how == WITH_CHECKPOINT
            released.clear()
        return Protected(self._num_tokens, self._num_checkpoints)

    def checkpoint_stored(self, node: RadixNode) -> None:
        """Count the new checkpoint of ``node``, which is locked. O(1)."""
        if self.nodes[node] == COUNTED:
            self.nodes[node] = WITH_CHECKPOINT
            self._num_checkpoints += 1

    def forget(self, leaf: RadixNode) -> None:
        """Uncount ``leaf``, which is pinned but no longer locked and loses its KV."""
        self._num_checkpoints -= self.released.pop(leaf) == WITH_CHECKPOINT
        self._unpin(leaf)

    def _pin(self, node: RadixNode) -> None:
        parent = node.parent
        while parent is not None:
            node.pins += 1
            if node.pins > 1:
                return
            self._num_tokens += node.end - parent.end
            node, parent = parent, parent.parent

    def _unpin(self, node: RadixNode) -> None:
        parent = node.parent
        while parent is not None:
            node.pins -= 1
            if node.pins:
                return
            self._num_tokens -= node.end - parent.end
            node, parent = parent, parent.parent

    def check(self, nodes: Iterable[RadixNode]) -> None:
        """Recompute the counts from all ``nodes``. O(nodes)."""
        num_tokens = num_checkpoints = 0
        for node in nodes:
            how, before = self.nodes.get(node, NEW), self.released.get(node, NEW)
            own = (how != NEW) + (before != NEW)
            pins = own + sum(child.pins > 0 for child in members(node.children))
            assert node.pins == pins, f"{node} has {node.pins} pins, not {pins}"
            num_tokens += (node.end - node.start) * (pins > 0)
            num_checkpoints += (how == WITH_CHECKPOINT) + (before == WITH_CHECKPOINT)
            if how != NEW:
                assert (how == WITH_CHECKPOINT) == (node.checkpoint is not None), f"{node} {how}"
        new = [how == NEW for how in self.nodes.values()]
        assert new == sorted(new), "a lock was counted before an older one"
        assert num_tokens == self._num_tokens, f"{num_tokens} pinned, counted {self._num_tokens}"
        assert num_checkpoints == self._num_checkpoints, "checkpoints counted under locks"


NO_ROWS: Indices = np.empty(0, np.int32)


class Residency:
    """State changes of the nodes of one cache. The cache class decides when they happen."""

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
        self.arena = arena_of(pages)
        self.owners: RowIndex | None = None
        """Buffer of each row, if rows can move, else None."""
        if self.arena is not None:
            self.owners = RowIndex(pages.capacity, self.gathered)
            self.arena.holders[self.owners] = None
        self.slots = slots
        self.policy = policy
        self.item_bytes = item_bytes
        self.stats = stats
        self.offload: OffloadTiers | None = None
        """Offload tiers, or None if there are none."""
        self.listener: Listener | None = None
        """Listener that is notified of every change, or None."""
        self.now = 0
        """Logical time: number of requests so far."""
        self.num_items = 0
        """Number of items created so far: the next serial number."""
        self.cached_tokens = 0
        self.num_checkpoints = 0
        self.locked_paths = LockedPaths()
        self.locked = self.locked_paths.nodes
        self.withheld: set[Checkpoint | Segment] = set()
        """Locked victims, withheld from the policy until they are unlocked."""
        self.locked_path_tokens = 0
        """Sum of the positions of locked nodes: an upper bound of the KV under locks."""

    def store_rows(self, node: RadixNode, rows: Indices) -> None:
        """Make ``node`` resident with ``rows``; the cache takes over the array.

        Callers must call ``offer_leaf`` afterwards if the node is still a leaf.
        """
        serial, num_tokens = self.num_items, len(rows)
        self.num_items = serial + 1
        node.kv = Segment(node, rows, self.now, serial, self.item_bytes)
        if self.owners is not None:
            self.owners.new[id(rows)] = rows
        self.cached_tokens += num_tokens
        self.stats.inserted_tokens += num_tokens
        if self.listener is not None:
            self.listener.kv_stored(node)

    def expect_child(self, parent: RadixNode) -> None:
        """Prepare ``parent`` for a new resident child: it stops being a leaf, or its path forks."""
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
                    self._set_superseded(before, before.num_successors > 0)
        elif parent.kv is not None:
            self._withdraw(parent.kv)

    def offer_leaf(self, leaf: RadixNode) -> None:
        """Add a leaf that has just become resident to the candidates."""
        if leaf.kv is not None and not leaf.children:
            self.policy.add(leaf.kv)

    def split(self, lower: RadixNode, position: int) -> RadixNode:
        """Split a node with its KV rows, which become two views of one array. O(page)."""
        upper = self.tree.split(lower, position)
        kv = lower.kv
        if kv is None:
            if self.offload is None or not self.offload.split(upper, lower):
                self.ghosts.num_bytes -= len(upper.edge)  # the upper part becomes resident
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
        """Make a ghost resident again with ``rows``.

        Callers must call ``offer_leaf`` afterwards if the node is still a leaf.
        """
        if self.offload is not None and self.offload.is_stored(ghost):
            self.offload.drop_kv(ghost)
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
        """Store ``slot`` as the checkpoint of ``node``, with ``uses`` earlier uses.

        ``offered`` is True if the policy holds the KV of ``node`` as a candidate. Returns the
        predecessor in its run. Pass it as ``before`` for the next checkpoint above, so that many
        checkpoints of one insertion do not each search for their place. O(1) with ``before``, else
        O(nodes up to the predecessor).
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
        if node.offloaded is not None and self.offload is not None:
            self.offload.drop_state(node)
        self.policy.add(checkpoint)
        if revives is not None:
            self.policy.add(revives)
        if self.listener is not None:
            self.listener.checkpoint_stored(node)
        return before

    def evict_one(self, kind: Kind | None) -> bool:
        """Evict the policy's victim. Returns False if nothing evictable remains.

        Amortised O(log n) per freed item.
        """
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
        """Free the checkpoint of an unlocked node.

        The node keeps the evicted item as a tombstone.
        """
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
            self._set_superseded(before, before.num_successors > 0)
        checkpoint.shallower = checkpoint.deeper = None
        node.checkpoint = None
        node.lost_checkpoint = checkpoint
        self.num_checkpoints -= 1
        self.stats.evicted_slots += 1
        if self.offload is not None:
            self.offload.add_checkpoint(node, checkpoint)
        self.slots.free(checkpoint.slot)

    def _drop_leaf(self, leaf: RadixNode) -> None:
        """Free the KV and checkpoint of an unlocked leaf, and the stateless nodes above it, because
        nothing could resume from those any more. O(nodes freed, and those up to a checkpoint)."""
        assert leaf.kv is not None
        self.policy.discard(leaf.kv, evicted=True)
        stateful, fade = self.item_bytes.state > 0, self._fade
        while True:
            if leaf.checkpoint is not None:
                self._drop_checkpoint(leaf)
            parent = fade(leaf)
            only = parent.children
            if only is not None:
                if not isinstance(only, dict) and only.deeper is not None and parent.parent:
                    # The path does not fork any more.
                    below, only.deeper = only.deeper, None
                    before = last_at(parent)
                    link(before, below)
                    if isinstance(before, Checkpoint):
                        self._set_superseded(before, True)
                return
            if parent.kv is None:
                return
            if parent.checkpoint is not None or parent.locks or not stateful:
                self.policy.add(parent.kv)
                return
            leaf = parent

    def _fade(self, leaf: RadixNode) -> RadixNode:
        """Turn a leaf into a ghost, free its rows, pass its recency up, and return the parent."""
        kv, parent = leaf.kv, leaf.parent
        assert kv is not None and parent is not None
        if self.listener is not None:
            self.listener.kv_removed(leaf)
        rows = kv.indices
        num_rows = len(rows)
        self.pages.release(rows)
        self.cached_tokens = cached_tokens = self.cached_tokens - num_rows
        self.stats.evicted_tokens += num_rows
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
        if leaf.offloaded is None or self.offload is None or not self.offload.add_kv(leaf, rows):
            self.ghosts.add(leaf)
        return parent

    def label_tip(self, node: RadixNode, stop_reason: str) -> None:
        """Add ``stop_reason`` to the label of the checkpoint that the answer ending at ``node``
        would be continued from, unless the path forks below it. O(nodes between)."""
        while not isinstance(node.children, dict):
            tip = node.checkpoint
            if tip is not None:
                label = f"{base_label(tip.label)}/{stop_reason}"
                if label != tip.label:
                    tip.label = label
                    self.policy.on_relabelled(tip)
                return
            if node.parent is None:
                return
            node = node.parent

    def announce_checkpoint(self, node: RadixNode) -> Checkpoint | None:
        """Mark the checkpoint that a deeper one below ``node`` will supersede, and return it.

        None if ``node`` has children, or there is no checkpoint on its run. O(nodes between).
        """
        before = None if node.children or node.parent is None else last_at(node)
        if not isinstance(before, Checkpoint):
            return None
        before.num_successors += 1
        self._set_superseded(before, True)
        return before

    def withdraw_announcement(self, checkpoint: Checkpoint) -> None:
        """Undo one ``announce_checkpoint``. The checkpoint may have been evicted. O(1)."""
        checkpoint.num_successors -= 1
        if checkpoint.node.checkpoint is checkpoint and not checkpoint.num_successors:
            self._set_superseded(checkpoint, checkpoint.deeper is not None)

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
        """Record a use at the end of ``node``: refresh its checkpoint and its KV only. O(1)."""
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
        """Remove ``item`` from the candidates."""
        if item in self.withheld:
            self.withheld.discard(item)
        else:
            self.policy.discard(item, evicted=False)

    def install(
        self, tree: RadixTree, ghosts: Iterable[RadixNode], now: int, num_items: int
    ) -> None:
        """Fill the empty cache with the nodes of ``tree``; see ``HybridRadixCache.install``."""
        resident = [node for node in tree.nodes() if node.kv is not None]
        rows = np.concatenate([NO_ROWS, *(node.kv.indices for node in resident if node.kv)])
        slots = [node.checkpoint.slot for node in resident if node.checkpoint is not None]
        self.pages.reserve(rows)
        try:
            self.slots.reserve(slots)
        except ValueError:
            self.pages.free(rows)
            raise
        self.tree.roots.update(tree.roots)
        self.tree.num_nodes = tree.num_nodes
        self.num_items += num_items
        self.now += now
        self.cached_tokens, self.num_checkpoints = len(rows), len(slots)
        self.stats.inserted_tokens += len(rows)
        self.stats.inserted_slots += len(slots)
        for node in ghosts:
            self.ghosts.add(node)
        if self.owners is not None:
            for node in resident:
                if node.kv is not None:
                    self.owners.new[id(node.kv.indices)] = node.kv.indices
        self._link_runs()
        for item in sorted(self.candidates(), key=lambda item: (item.last_used, item.serial)):
            self.policy.add(item)
        if self.listener is not None:
            introduce(self.listener, self.tree.nodes())

    def _link_runs(self) -> None:
        """Link the checkpoints of every run and mark superseded ones, before the policy gets any.
        O(tree)."""
        for node in self.tree.nodes():
            if node.checkpoint is not None:
                before = last_above(node)
                link(before, node.checkpoint)
                if isinstance(before, Checkpoint):
                    before.superseded = True

    def candidates(self) -> Iterator[Item]:
        """Iterate over the items that the policy must hold, found from scratch. O(tree)."""
        for node in self.tree.nodes():
            if node.checkpoint is not None and node.checkpoint not in self.withheld:
                yield node.checkpoint
            if node.kv is not None and not node.children and node.kv not in self.withheld:
                yield node.kv


def refuse_bad_insert(
    tokens: Tokens,
    kv_indices: Indices,
    checkpoints: Sequence[tuple[int, int]],
    owned_from: int,
    labels: Sequence[str],
    after: RadixNode | None,
    *,
    page_size: int,
    num_slots: int,
) -> None:
    """Raise ValueError for arguments that are wrong regardless of the tree. O(checkpoints)."""
    if getattr(tokens, "dtype", None) is not INT32 or tokens.ndim != 1:
        require_int32(tokens, "tokens")
    if getattr(kv_indices, "dtype", None) is not INT32 or kv_indices.ndim != 1:
        require_int32(kv_indices, "KV indices")
    num_tokens = len(tokens)
    if len(kv_indices) != num_tokens:
        raise ValueError(
            f"kv_indices must have one index per token (got {len(kv_indices)} for {num_tokens} "
            "tokens)"
        )
    if labels and len(labels) != len(checkpoints):
        raise ValueError(
            f"labels must be empty or have one per checkpoint (got {len(labels)} for "
            f"{len(checkpoints)} checkpoints)"
        )
    for position, slot in checkpoints:
        if not (type(slot) is type(position) is int and 0 <= slot < num_slots):
            raise ValueError(
                f"a checkpoint must be (position: int, slot: int) with 0 <= slot < {num_slots} "
                f"(got ({position!r}, {slot!r}))"
            )
    if len(checkpoints) > 1 and len({slot for _, slot in checkpoints}) < len(checkpoints):
        raise ValueError("two checkpoints have the same slot: give each a separate one")
    num_tokens -= num_tokens % page_size
    if not 0 <= owned_from <= num_tokens:
        raise ValueError(
            f"owned_from must be from 0 to {num_tokens}, the whole pages given (got {owned_from})"
        )
    if after is not None and not after.locks:
        raise ValueError("after is not locked: keep its lock until insert returns")


def append(
    residency: Residency,
    step: int,
    node: RadixNode,
    tokens: Tokens,
    rows: Indices,
    checkpoints: Sequence[tuple[int, int]],
) -> RadixNode:
    """Make ``tokens`` resident below ``node`` with copies of ``rows``, and return the new leaf.

    Ghosts on the path are revived first, then nodes are added. A new node ends at each planned
    checkpoint, so that none is split at once: separate nodes share no buffer.
    """
    first = node.end
    if node.ghosts is not None:
        ghost, inside, length = residency.tree.walk(node, tokens, ghosts=True)
        path = []
        while ghost is not node:
            path.append(ghost)
            assert ghost.parent is not None
            ghost = ghost.parent
        for ghost in reversed(path):
            residency.revive(ghost, rows[node.end - first : ghost.end - first].copy())
            node = ghost
        if inside is not None and length > node.end:
            upper = residency.split(inside, length)
            residency.tree.revive(upper)
            if residency.offload is not None:
                residency.offload.drop_kv(upper)
            residency.store_rows(upper, rows[node.end - first : length - first].copy())
            node = upper
    start, num_tokens = node.end - first, len(tokens)
    if len(checkpoints) > 1 or (checkpoints and checkpoints[0][0] < first + num_tokens):
        for end in sorted(at - first for at, _ in checkpoints if at % step == 0):
            if start < end < num_tokens:
                node = residency.tree.grow(node, tokens[start:end])
                residency.store_rows(node, rows[start:end].copy())
                start = end
    if start < num_tokens:
        if start:
            tokens, rows = tokens[start:], rows[start:]
        node = residency.tree.grow(node, tokens)
        residency.store_rows(node, rows.copy())
    return node


def refresh(residency: Residency, node: RadixNode) -> None:
    """Refresh the recency of the KV of ``node``, which was published again."""
    kv = node.kv
    if kv is not None:
        kv.last_used = residency.now
        if not node.children and kv not in residency.withheld:
            residency.policy.touch(kv)


def place(
    residency: Residency,
    step: int,
    leaf: RadixNode,
    checkpoints: Sequence[tuple[int, int]],
    labels: Sequence[str],
    offered_to: int,
) -> tuple[int, ...]:
    """Store checkpoints on the path to ``leaf``, splitting where needed; return the slots not
    taken.

    The policy already holds nodes that end at or before ``offered_to``. O(path).
    """
    rejected: list[int] = []
    node, end = leaf, leaf.end
    before: Link | None = None
    order: Sequence[int] = (0,)
    if len(checkpoints) > 1:
        order = sorted(range(len(checkpoints)), key=checkpoints.__getitem__, reverse=True)
    for index in order:
        position, slot = checkpoints[index]
        if position % step or not 0 < position <= end:
            rejected.append(slot)
            continue
        while (above := node.parent) is not None and above.end >= position:
            node = above
        if node.end > position:
            node = residency.split(node, position)
        if node.checkpoint is not None:
            rejected.append(slot)
            continue
        label = labels[index] if labels else ""
        offered = position <= offered_to
        before = residency.store_checkpoint(node, slot, label, offered, before)
    return tuple(rejected)


def make_room_for_kv(residency: Residency, num_tokens: int) -> bool:
    """Evict until ``num_tokens`` rows, whole pages, are free.

    Returns False, with nothing evicted, if that is impossible. O(log n) per evicted item. If locks
    may prevent it, also O(1) per node locked or unlocked since the last such call.
    """
    pages = residency.pages
    if not _possible(residency, num_tokens * pages.unit_bytes, num_tokens - pages.num_free):
        return False
    kind: Kind | None = "kv" if pages.budget is None else None
    while pages.num_free < num_tokens and residency.evict_one(kind):
        pass
    return pages.num_free >= num_tokens


def make_room_for_slot(residency: Residency) -> bool:
    """Evict until a slot is free. Returns False, with nothing evicted, if that is impossible.

    Costs as ``make_room_for_kv``.
    """
    slots = residency.slots
    budget = slots.budget
    if budget is None or not slots.num_unused:
        residency.evict_one("checkpoint")
        return slots.num_free > 0
    if not _possible(residency, slots.unit_bytes, 0):
        return False
    while budget.free_bytes < slots.unit_bytes and residency.evict_one(None):
        pass
    return budget.free_bytes >= slots.unit_bytes


def _possible(residency: Residency, wanted_bytes: int, short_tokens: int) -> bool:
    """Return whether eviction could free that much.

    Under a shared budget this is ``wanted_bytes`` in all, else ``short_tokens`` beyond the free
    ones.
    """
    pages, slots = residency.pages, residency.slots

    def suffices(locked_tokens: int, locked_slots: int) -> bool:
        num_tokens = residency.cached_tokens - locked_tokens
        if pages.budget is None:
            return short_tokens <= num_tokens
        num_slots = residency.num_checkpoints - locked_slots
        num_bytes = num_tokens * pages.unit_bytes + num_slots * slots.unit_bytes
        return wanted_bytes - pages.budget.free_bytes <= num_bytes

    is_certain = suffices(residency.locked_path_tokens, len(residency.locked))
    return is_certain or suffices(*residency.locked_paths.protected())


def check_cache(residency: Residency, step: int) -> None:
    """Recompute every invariant of the cache from scratch. O(tree + pools).

    ``step``: checkpoints are at its multiples.

    Raises:
        AssertionError: an invariant fails; the message names the first.
    """
    tree = residency.tree
    check_tree(tree, residency.ghosts)
    resident = [node for node in tree.nodes() if node.kv is not None]
    checkpoints = [node.checkpoint for node in resident if node.checkpoint is not None]
    _check_rows(residency, resident)
    _check_slots(residency, checkpoints)
    for checkpoint in checkpoints:
        assert checkpoint.position % step == 0, f"{checkpoint} is off the grid"
        expected = checkpoint.num_successors > 0 or is_superseded(checkpoint)
        assert checkpoint.superseded == expected, f"{checkpoint} superseded: {not expected}"
    locked = {node for node in tree.nodes() if node.locks}
    assert locked == set(residency.locked), "the locked nodes are not those listed"
    assert residency.locked_path_tokens == sum(node.end for node in locked), "locked path tokens"
    residency.locked_paths.check(tree.nodes())
    residency.gathered.check(residency.cached_tokens)
    for segment, rows in residency.gathered.rows.items():
        assert np.array_equal(rows, _path_rows(segment.node)), (
            f"gather of {segment} is not its path"
        )
    for item in residency.withheld:
        assert item.node.locks, f"{item} is withheld but not locked"
        assert item in (item.node.kv, item.node.checkpoint), f"{item} is withheld but gone"
    _check_candidates(residency)
    if residency.offload is not None:
        check_offload(residency.offload, list(tree.nodes()), [*tree.roots.values()])
    serials = [item.serial for node in resident for item in (node.kv, node.checkpoint) if item]
    assert len(set(serials)) == len(serials), "two items share a serial"
    assert all(serial < residency.num_items for serial in serials), "a serial from the future"


def _path_rows(node: RadixNode) -> Indices:
    parts = []
    while node.kv is not None and node.parent is not None:
        parts.append(node.kv.indices)
        node = node.parent
    return np.concatenate(parts[::-1])


def _check_candidates(residency: Residency) -> None:
    listed = residency.policy.candidates()
    if listed is None:
        return
    held, due = list(listed), set(residency.candidates())
    assert len(set(held)) == len(held), "the policy holds an item twice"
    for item in due.difference(held):
        raise AssertionError(f"the policy lacks {item}")
    for item in set(held) - due:
        raise AssertionError(f"the policy holds {item}, which must not be a candidate")


def is_superseded(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is superseded, by definition: a deeper one is on its unforked
    path.

    O(path).
    """
    node: RadixNode = checkpoint.node
    while len(children := list(members(node.children))) == 1:
        node = children[0]
        if node.checkpoint is not None:
            return True
    return False


def _check_rows(residency: Residency, resident: list[RadixNode]) -> None:
    pages = residency.pages
    pages.check()
    parts = [node.kv.indices for node in resident if node.kv is not None]
    cached = np.concatenate(parts) if parts else np.empty(0, np.int32)
    assert len(cached) == residency.cached_tokens, (
        f"{len(cached)} rows cached, counted {residency.cached_tokens}"
    )
    assert len(cached) == 0 or (cached.min() >= 0 and cached.max() < pages.capacity), (
        "a cached row is out of range"
    )
    both = np.concatenate([cached, pages.free_rows()])
    assert are_distinct(both), "a KV row is cached twice, or cached and free"
    if residency.owners is not None and residency.arena is not None:
        residency.owners.check(parts)
        residency.arena.check_taken(cached)
        assert residency.owners in residency.arena.holders, "the tree is not notified of moves"
    if pages.budget is not None:
        taken = pages.num_taken * pages.unit_bytes
        taken += residency.slots.num_taken * residency.slots.unit_bytes
        free = pages.budget.total_bytes - taken
        assert free == pages.budget.free_bytes, (
            f"{free} bytes free, counted {pages.budget.free_bytes}"
        )
        assert free >= 0, "over the byte budget"


def _check_slots(residency: Residency, checkpoints: list[Checkpoint]) -> None:
    slots = residency.slots
    slots.check()
    cached = [checkpoint.slot for checkpoint in checkpoints]
    assert len(cached) == residency.num_checkpoints, (
        f"{len(cached)} checkpoints, counted {residency.num_checkpoints}"
    )
    assert all(0 <= slot < slots.capacity for slot in cached), "a cached slot is out of range"
    both = cached + slots.free_slots()
    assert len(set(both)) == len(both), "a slot is cached twice, or cached and free"
