"""HybridRadixCache: one radix tree over two resources, KV rows and state checkpoints.

The cache owns its tree, allocators and eviction policy, and every change of state. Rules:

- KV is resident on an ancestor-closed part of the tree: only leaves lose it (``_drop_leaf``).
- A checkpoint exists only where KV is resident. Evicted from an inner node, it leaves a tombstone.
- A leaf that loses its last checkpoint loses its KV too, and so does every stateless node above it
  that becomes a leaf, because nothing could resume from them.
- A locked node keeps its checkpoint. All KV above it stays because it is not in a leaf.
- The policy holds the candidates: checkpoints, and KV of leaves. A locked victim is withheld from
  it until it is unlocked. So locking and unlocking, done for every request, do not involve the
  policy.
- A refused allocation evicts nothing.

Recency of KV is recorded at the node of the use only. When a child is evicted, its parent takes
over the later last use and the sum of uses. The result is the same as updating the whole path at
every use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from itertools import chain
from math import lcm
from operator import itemgetter
from typing import Any

import numpy as np

from hybridcache.allocators.moves import NOT_CARRIED_OUT, Indices, Move, StepPlan, StepQueue
from hybridcache.allocators.pools import ArenaAllocator, PageAllocator, SlotAllocator, are_distinct
from hybridcache.radix.api import (
    CacheStats,
    Eviction,
    InsertResult,
    Listener,
    Losses,
    PrefixMatch,
    Protected,
    Resumable,
)
from hybridcache.radix.client_sessions import claim, mark_ended
from hybridcache.radix.offload import OffloadTiers
from hybridcache.radix.protocol import EvictionPolicy, Item, Kind, Placed, raise_failure
from hybridcache.radix.tokens import EMPTY, INT32, Tokens, require_index, require_int32, whole_bytes
from hybridcache.radix.tree import (
    SESSION_END,
    TOKEN_BYTES,
    Checkpoint,
    Edge,
    GhostList,
    ItemBytes,
    NodeHandle,
    PathPart,
    Promise,
    RadixNode,
    RadixTree,
    is_superseded,
    last_checkpoint,
    members,
    read_ghosts,
    render_text,
)

EVICTED = (
    "the node of this match or result was evicted: match again, and lock the node before the next "
    "eviction"
)
FOREIGN = "this node or match belongs to another cache: match the tokens in this one"


class LockHandle:
    """Lock on one node and its path, to be returned with ``cache.unlock(handle)``, or used in a
    ``with`` statement, as in the example of ``HybridRadixCache``."""

    __slots__ = ("cache", "node", "superseded")

    def __init__(self, node: RadixNode | None, cache: HybridRadixCache) -> None:
        self.node = node
        """Locked node. None if nothing was cached, or after ``unlock``."""
        self.cache = cache
        """Cache in which the lock was taken."""
        self.superseded: Checkpoint | None = None
        """Checkpoint that counts as superseded until the lock is returned, or None."""

    def __enter__(self) -> LockHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.unlock(self)


class RowIndex:
    """Edges of one tree by row: a ``RowHolder``, which owns the cached rows.

    Finds the rows of an emptied slab without a search. It is updated only when a slab is emptied:
    until then, a new edge costs one dictionary entry.
    """

    def __init__(self, num_rows: int) -> None:
        # By row the serial of its edge: right for rows that the tree had at the last move and
        # still has, unless a split has moved them. Host memory is taken as rows are used.
        self._serials = np.zeros(num_rows, np.int64)
        self._known: dict[int, Edge] = {}
        """Edges in the table, by serial."""
        self.new: dict[int, Edge] = {}
        """Edges that are not in the table yet, by serial. Callers add each new one here."""

    def remove(self, edge: Edge) -> None:
        """Remove the edge of an evicted node. O(1)."""
        if self.new.pop(edge.serial, None) is None:
            del self._known[edge.serial]

    def rows_moved(self, move: Move) -> int:
        """Rename the rows of ``move`` in their edges, and return how many of them are cached.
        O(rows of those edges + rows added since the last move)."""
        if self.new:
            added = [edge.indices for edge in self.new.values()]
            # Four times as fast as with int32 for an index, which numpy casts a piece at a time.
            index = np.concatenate(added, dtype=np.intp)
            self._serials[index] = np.repeat(list(self.new), list(map(len, added)))
            self._known |= self.new
            self.new.clear()
        serials = self._serials.take(move.src)
        self._serials[move.dst.astype(np.intp)] = serials
        ends = np.flatnonzero(serials[1:] != serials[:-1])
        num_owned = 0
        for serial in {*serials[ends].tolist(), serials.item(-1)}:
            # A row that left the tree keeps the serial of an edge that is gone, or has lost it.
            if (edge := self._known.get(serial)) is not None:
                rows = edge.indices.copy()
                num_owned += len(move.rename(rows))
                edge.rows = rows.tobytes()
        return num_owned

    def renumbered(self, edge: Edge) -> None:
        """Note that ``edge`` has other rows than before. O(1)."""
        self._known.pop(edge.serial, None)
        self.new[edge.serial] = edge

    def check(self, edges: list[Edge]) -> None:
        """Check that the index has ``edges``, those of all resident nodes. O(rows)."""
        known = {edge.serial: edge for edge in edges}
        assert known == self._known | self.new, "the edges known are not those of the tree"
        for serial in self._known.keys() - self.new.keys():
            is_found = self._serials[self._known[serial].indices] == serial
            assert is_found.all(), f"a row of edge {serial} is lost"


class HybridRadixCache:
    """Prefix cache for models with linear-attention layers: resumes where KV *and* a state exist.

    Made by ``build_prefix_cache``. Checkpoints are at multiples of ``grid``, in whole pages.
    ``policy`` orders evictions. With ``item_bytes.state == 0`` the model is attention-only: a
    prompt then resumes from KV alone, at any multiple of grid and page, and no checkpoint is
    stored. With ``keeps=False`` nothing is stored: the cache is an allocator of rows and slots.

    ``tokens`` is int32[n]. ``namespace`` is None, a str, bytes, an int, or a tuple of these.
    Requests in different namespaces share nothing. All methods raise ValueError, with nothing
    changed, for other tokens and namespaces, and for a node that was evicted or belongs to another
    cache. A lock that is never returned keeps its path forever. A cache is not thread-safe.

    Any other exception in the middle of a call that changes the cache, such as a MemoryError or an
    interrupt, may leave the cache half changed. Go on with ``cache.rebuilt()``, which is empty, and
    begin new leases. ``match`` and the other methods that only read need nothing.

    >>> import numpy as np
    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=4))

    Rows and slots are allocated, written by their owner, and published:

    >>> prompt = np.arange(10, dtype=np.int32)
    >>> rows, slot = cache.allocate_kv(10), cache.allocate_slot()
    >>> cache.insert(prompt, rows, [(8, slot)]).inserted_len
    10

    A match ends at the checkpoint, because the state is needed to go on:

    >>> match = cache.match(prompt)
    >>> match.cached_len, match.checkpoint
    (8, 0)

    A locked prefix is not evicted, only the two tokens after it:

    >>> with cache.lock(match.node):
    ...     cache.evict(num_tokens=10)
    Eviction(num_tokens=2, num_slots=0)
    >>> cache.check(held_tokens=0, held_slots=0)
    """

    lease_kind: Any = None
    """Class of its leases, or None for ``Lease``."""
    lock_kind: type[LockHandle] = LockHandle
    """Class of its locks."""

    def __init__(
        self,
        pages: PageAllocator,
        slots: SlotAllocator,
        policy: EvictionPolicy,
        *,
        grid: int,
        item_bytes: ItemBytes,
        ghost_bytes: int = 0,
        keeps: bool = True,
    ) -> None:
        self.page_size: int = pages.page_size
        """Tokens of one KV page."""
        self.grid: int = grid
        """Grid as configured, in tokens. See ``checkpoint_grid``."""
        self.stats: CacheStats = CacheStats()
        """Counters since the construction."""
        self.arena = pages if isinstance(pages, ArenaAllocator) else None
        """Shared memory of rows and slots, or None if rows never move."""
        self.offload: OffloadTiers | None = None
        """Host and disk tiers, or None if there are none."""
        self.steps = StepQueue()
        """Step plan under construction. Leases register here."""
        self.policy = policy
        """Eviction policy, for inspection: attributes of an own policy are read through it."""
        self.item_bytes = item_bytes
        """Bytes of one token's KV and of one state, as used by policies."""
        self.now = 0
        """Logical time: number of requests counted so far."""
        self.num_items = 0
        """Number of items created so far: the serial number of the next one."""
        self.cached_tokens = 0
        """Number of KV rows that the cache owns."""
        self.num_checkpoints = 0
        """Number of state slots that the cache owns."""
        self.shares_memory = pages.budget is not None
        """True if KV can take the memory of a free slot (arena), False with two pools."""
        self.checkpoint_grid: int = lcm(grid, pages.page_size)
        """Distance of possible checkpoints: ``grid`` in whole pages."""
        self._keeps = keeps
        self._has_states = item_bytes.state > 0
        self.needs_states = self._has_states and keeps
        """True if only requests with a state can reuse entries."""
        self._pages = pages
        self._slots = slots
        self._is_cached = bytearray(slots.capacity)
        """1 for each slot that the cache owns, else 0."""
        self._tree = RadixTree(pages.page_size)
        self.ghosts = GhostList(self._tree, ghost_bytes)
        """Nodes with evicted KV, for inspection."""
        self._row_index: RowIndex | None = None
        """Edge of each row, if rows can move, else None."""
        if self.arena is not None:
            self._row_index = RowIndex(pages.capacity)
            self.arena.holders.update({self.steps: None, self._row_index: None})
        self.make: Callable[[], HybridRadixCache] | None = None
        """Maker of another cache of the same configuration, set by ``build_prefix_cache``."""
        self._listeners: tuple[Listener, ...] = ()
        self._withheld: set[Item] = set()
        """Locked victims, withheld from the policy until they are unlocked."""
        self._locked_len = 0
        """Sum of the path lengths of locked nodes: at least ``_locked_tokens``."""
        self._locked_slots = 0
        """Checkpoints at locked nodes."""
        self._locked_tokens = 0
        """KV rows on the paths of locked nodes, shared paths counted once, up to ``_unsettled``."""
        self._unsettled: dict[RadixNode, int] = {}
        """Nodes locked (1) and unlocked (-1) since ``_locked_tokens`` was counted."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(cached_tokens={self.cached_tokens}, "
            f"free_tokens={self.free_tokens}, num_checkpoints={self.num_checkpoints}, "
            f"free_slots={self.free_slots}, policy={self.policy})"
        )

    # --- Reading ----------------------------------------------------------------------------------

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Look up how much of ``tokens`` is cached, and the causes of the losses. Changes nothing:
        no split, no recency. O(n)."""
        if type(tokens) is not np.ndarray or tokens.dtype is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        if (failure := self.policy.failure) is not None:
            raise_failure(failure)
        num_tokens = len(tokens)
        root = self._tree.root(namespace)
        node: RadixNode | None
        ids = whole_bytes(tokens) or tokens.tobytes()
        node, inside, kv_match_len = self._tree.walk(root, ids, 0)
        seen_len = kv_match_len
        missed: Checkpoint | None = None
        forks = inside is not None or node is root or bool(node.children)
        deepest = node
        if inside is None and node.ghosts:
            deepest, seen_len, missed, forks = read_ghosts(self._tree, node, ids)
        reachable = min(kv_match_len, num_tokens - 1)
        grid_len = reachable - reachable % self.checkpoint_grid
        checkpoint: Checkpoint | None = None
        last: NodeHandle | None = None
        if not self._has_states:
            cached_len = saved_len = grid_len = max(grid_len, 0)
            if cached_len:
                end = PathPart(node if inside is None else inside, cached_len).last()
                last = PathPart(end, cached_len)
        else:
            lost_len = 0
            while node is not None:
                if node.end < num_tokens:
                    if node.checkpoint is not None:
                        last, checkpoint = node, node.checkpoint
                        break
                    if not lost_len and node.lost_checkpoint is not None:
                        lost_len = node.end
                        missed = missed or node.lost_checkpoint
                node = node.parent
            cached_len = 0 if checkpoint is None else checkpoint.position
            saved_len = lost_len or cached_len  # A lost checkpoint lies deeper.
            if grid_len < saved_len:
                grid_len = saved_len
        offload = self.offload
        loadable = () if offload is None else offload.loadable(deepest, cached_len, num_tokens)
        losses = Losses(
            num_tokens - seen_len,
            seen_len - kv_match_len,
            saved_len - cached_len,
            grid_len - saved_len,
            kv_match_len - grid_len,
        )
        return PrefixMatch(
            num_tokens,
            cached_len,
            kv_match_len,
            seen_len,
            losses,
            last,
            namespace,
            missed,
            checkpoint,
            loadable,
            forks,
        )

    def gather(self, node: NodeHandle | None) -> Indices:
        """Return a copy of the KV indices from the root to the end of ``node``: int32[position].
        O(position)."""
        above, parts = self._usable(node), []
        while above is not None and above.kv is not None:
            parts.append(above.kv.rows)
            above = above.parent
        if not parts:
            return EMPTY
        rows = np.frombuffer(bytearray().join(parts[::-1]), INT32)
        return rows[: node.length] if isinstance(node, PathPart) else rows

    def protected(self) -> Protected:
        """Return how much of the cached memory is locked, shared paths counted once.

        O(1), plus one step per node up to the next locked path for each lock that was taken or
        returned since the last count.
        """
        changes, self._unsettled = self._unsettled, {}
        for change in (1, -1) if changes else ():
            for locked, its_change in changes.items():
                node = locked
                while its_change == change and (parent := node.parent) is not None:
                    node.pins += change
                    if node.pins != (change > 0):
                        break
                    self._locked_tokens += change * (node.end - parent.end)
                    node = parent
        return Protected(self._locked_tokens, self._locked_slots)

    def iter_nodes(self) -> Iterator[RadixNode]:
        """Iterate over the nodes of the tree, parents before children, ghosts included. O(tree).

        For reading only; the cache must not change during the iteration. ``tokens`` are those in
        (``start``, ``end``], and ``parent``, ``children`` and ``ghosts`` the neighbours. ``kv`` is
        None for ghosts, else ``kv.indices`` has the rows. ``checkpoint`` is None without a state,
        else ``checkpoint.slot`` has it. Both have the fields of ``Item``. ``locks`` counts the
        locks of this node. A root is its namespace (``key``) and is not listed.
        """
        return self._tree.nodes()

    def root(self, namespace: Hashable = None) -> RadixNode | None:
        """Return the root of ``namespace``, for reading only, or None if nothing is in it. O(1)."""
        root = self._tree.root(namespace)
        return root if root.children or root.ghosts else None

    def render(self, max_nodes: int = 1000) -> str:
        """Draw the tree as text, one line per node. O(nodes drawn).

        >>> import numpy as np
        >>> from hybridcache import CacheConfig, build_prefix_cache
        >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
        >>> rows = cache.allocate_kv(3)
        >>> result = cache.insert(np.arange(3, dtype=np.int32), rows, namespace="tenant")
        >>> print(cache.render())
        namespace 'tenant'
        `- 0..3
        """
        return render_text(self._tree, max_nodes)

    @property
    def num_kv_tokens(self) -> int:
        """Number of KV rows, free or not, those of an arena's states included. O(1)."""
        return self._pages.capacity

    @property
    def free_tokens(self) -> int:
        """Number of KV rows available without eviction. O(1)."""
        return self._pages.num_free

    @property
    def free_slots(self) -> int:
        """Number of state slots available without eviction. O(1)."""
        return self._slots.num_free

    @property
    def num_slots(self) -> int:
        """Number of state slots, free or not. At 0 no request with a state can begin. O(1)."""
        return self._slots.capacity

    @property
    def num_nodes(self) -> int:
        """Number of nodes, ghosts included. O(1)."""
        return self._tree.num_nodes

    def evicted(self, match: PrefixMatch) -> list[Checkpoint]:
        """Return ``match.missed`` and the evicted checkpoints between it and the next cached one
        above, the deepest first. O(nodes between)."""
        if match.missed is None:
            return []
        found, node = [match.missed], match.missed.node.parent
        while node is not None and node.checkpoint is None:
            if node.lost_checkpoint is not None:
                found.append(node.lost_checkpoint)
            node = node.parent
        return found

    # --- Uses and locks ---------------------------------------------------------------------------

    def touch(self, match: PrefixMatch, resumes: bool = False) -> None:
        """Record one request: refresh its checkpoint and KV, and count its hits and losses.

        A request that ``resumes`` after a preemption was counted before, so ``stats`` stays as it
        is. O(1), plus the nodes between the checkpoint and the ghost that was missed.
        """
        last, missed = self._usable(match.node), self.evicted(match)
        self.now += 1
        if not resumes:
            self.stats.record(match)
        self.refresh(last)
        notify = self.policy.on_ghost_hit
        for item in missed:
            notify(item)
            item.earlier_uses += 1
            notify = self.policy.on_ghost_hit_above

    def refresh(self, node: NodeHandle | None) -> None:
        """Count a use of ``node`` without a request: its recency changes, no statistics. O(1)."""
        last = self._usable(node)
        if last is None:
            return
        now, policy = self.now, self.policy
        checkpoint = last.checkpoint
        if checkpoint is not None:
            checkpoint.last_used = now
            checkpoint.uses += 1
            if checkpoint not in self._withheld:
                policy.touch(checkpoint)
        kv = last.kv
        assert kv is not None
        kv.last_used = now
        kv.uses += 1
        if not last.children and kv not in self._withheld:
            policy.touch(kv)

    def lock(self, node: NodeHandle | None) -> LockHandle:
        """Protect ``node``, its checkpoint and the KV of its path from eviction.

        Returns a context manager. It is returned at the end of its block, or by ``unlock``. If
        ``node`` is None, it protects nothing. To protect a whole prompt, lock the node of a longer
        match, because ``match`` never returns the last token of its argument:
        ``lock(match(np.append(prompt, np.int32(0))).node)``. In an attention-only cache this splits
        an edge if the hit ends inside it. O(1).
        """
        last = self._usable(node)
        if last is not None:
            if type(node) is PathPart and last.end > node.length:
                last = self._split(last, node.length)
            last.locks += 1
            if last.locks == 1:
                self._locked_len += last.end
                self._locked_slots += last.checkpoint is not None
                if self._unsettled.pop(last, None) is None:
                    self._unsettled[last] = 1
        return self.lock_kind(last, self)

    def lock_kv(self, tokens: Tokens, namespace: Hashable = None) -> LockHandle:
        """Protect the cached KV of ``tokens``, whether or not there is a checkpoint at its end.

        The ``node`` of the result ends where the cached KV ends, or is None if nothing is cached.
        Splits an edge if ``tokens`` end or differ inside it. Only a checkpoint exactly at that node
        is protected, those above it are not: to keep a resumable prefix, use ``lock``. This is not
        a use: no recency changes. O(n).
        """
        require_int32(tokens, "tokens")
        root = self._tree.root(namespace)
        node, inside, kv_match_len = self._tree.walk(root, tokens.tobytes(), 0)
        if inside is not None:
            node = self._split(inside, kv_match_len)
        return self.lock(None if node is root else node)

    def unlock(self, handle: LockHandle) -> None:
        """Return a lock. A second call does nothing. Raises ValueError if another cache returned
        it, or it is not a handle. O(1)."""
        if not isinstance(handle, LockHandle) or handle.cache is not self:
            raise ValueError(f"expected the result of lock of this cache (got {handle!r})")
        node = handle.node
        if node is None:
            return
        handle.node = None
        old = handle.superseded
        if old is not None:
            handle.superseded = None
            old.num_successors -= 1
            if old.node.checkpoint is old:
                self._review(old.node)
        node.locks -= 1
        if node.locks:
            return
        self._locked_len -= node.end
        self._locked_slots -= node.checkpoint is not None
        if self._unsettled.pop(node, None) is None:
            self._unsettled[node] = -1
        for item in (node.checkpoint, node.kv):
            if item in self._withheld:
                self._withheld.discard(item)
                self.policy.add(item)

    def _usable(self, node: NodeHandle | None) -> RadixNode | None:
        """Return the node in which ``node`` ends, or None for None.

        Raises ValueError if it was evicted, or is none of this cache.
        """
        if node is None:
            return None
        last = node
        if type(last) is not RadixNode:
            if type(last) is not PathPart:
                raise ValueError(f"expected a node that this cache returned (got {node!r})")
            last = last.last()
        kv = last.kv
        if kv is None:
            raise ValueError(EVICTED)
        if kv.item_bytes is not self.item_bytes:  # each cache has its own object
            raise ValueError(FOREIGN)
        return last

    # --- Memory -----------------------------------------------------------------------------------

    def allocate_kv(self, num_tokens: int) -> Indices | None:
        """Take rows for ``num_tokens`` tokens in whole pages, evicting as needed.

        Returns None, with nothing evicted, if that many are not available. O(num_tokens), plus
        O(log n) per evicted item. Raises ValueError for a negative number.
        """
        if type(num_tokens) is not int:
            require_index(num_tokens, "num_tokens")
        pages = self._pages
        rows = pages.allocate(num_tokens)
        if rows is None:
            wanted = -(-num_tokens // self.page_size) * self.page_size
            if self._can_free(wanted * pages.unit_bytes, wanted):
                kind: Kind | None = "kv" if pages.budget is None else None
                while rows is None and self.evict_next(kind):
                    rows = pages.allocate(num_tokens)
            if rows is None:
                self.stats.refusals += 1
        return rows

    def allocate_slot(self, replaces: LockHandle | None = None) -> int | None:
        """Take one state slot, evicting as needed. Returns None, with nothing evicted, if none is
        available.

        ``replaces`` is the lock of a running request that will save a deeper checkpoint in the
        slot. Until that lock is returned, the checkpoint at or above its node counts as superseded,
        unless other tokens are cached below the node. So it can be evicted in favour of the new
        one. O(nodes up to that checkpoint).
        """
        if replaces is not None and replaces.superseded is None:
            node = replaces.node
            before = None if node is None or node.children else last_checkpoint(node)
            if before is not None:
                replaces.superseded = before
                before.num_successors += 1
                self._review(before.node)
        slots, budget = self._slots, self._slots.budget
        if slots.num_taken == slots.capacity:
            self.evict_next("checkpoint")
        elif budget is not None and budget.free_bytes < slots.unit_bytes:
            is_possible = self._can_free(slots.unit_bytes, 0)
            while is_possible and budget.free_bytes < slots.unit_bytes:
                is_possible = self.evict_next()
        slot = slots.allocate()
        if slot is None:
            self.stats.refusals += 1
        return slot

    def free_kv(self, kv_indices: Indices) -> None:
        """Return held rows: rows from ``allocate_kv`` that were never published. O(rows).

        Rows that are free or of the cache are found by ``check``, or at once with
        ``CacheConfig.debug``.

        Raises:
            ValueError: ``kv_indices`` is not int32[n] of whole pages in range, or more than all
                callers hold. Nothing is freed.
        """
        if type(kv_indices) is not np.ndarray or (kv_indices.dtype, kv_indices.ndim) != (INT32, 1):
            require_int32(kv_indices, "rows")
        pages, num_rows = self._pages, len(kv_indices)
        num_held = pages.num_taken - self.cached_tokens
        if num_rows > num_held:
            raise ValueError(f"{num_rows} rows given back, but only {num_held} are held")
        if num_rows and kv_indices.view(np.uint32).max() >= pages.capacity:  # Negative: large.
            raise ValueError(f"a row given back is not of this pool of {pages.capacity}")
        if num_rows % pages.page_size or (kv_indices[:1] % pages.page_size).any():
            raise ValueError(f"{num_rows} rows are not whole pages of {pages.page_size}")
        pages.free(kv_indices)

    def take_back(self, rows: Indices) -> None:
        """As ``free_kv``, without its checks: for leases, whose rows nobody else changes."""
        self._pages.free(rows)

    def free_slot(self, slot: int) -> None:
        """Return a held slot: one from ``allocate_slot`` that no ``insert`` has taken. O(1).

        Raises:
            ValueError: the slot is out of range, free or of the cache.
        """
        if type(slot) is not int:
            require_index(slot, "slot")
        if 0 <= slot < len(self._is_cached) and self._is_cached[slot]:
            raise ValueError(f"slot {slot} is the cache's, from insert until its eviction")
        self._slots.free(slot)

    def evict(self, num_tokens: int = 0, num_slots: int = 0) -> Eviction:
        """Evict until that much was freed or nothing evictable remains. O(log n) per item."""
        stats = self.stats
        tokens, slots = stats.evicted_tokens, stats.evicted_slots
        while stats.evicted_tokens - tokens < num_tokens and self.evict_next("kv"):
            pass
        while stats.evicted_slots - slots < num_slots and self.evict_next("checkpoint"):
            pass
        return Eviction(stats.evicted_tokens - tokens, stats.evicted_slots - slots)

    def evict_next(self, kind: Kind | None = None) -> bool:
        """Evict the policy's next victim, of either kind if rows and states share their memory.

        Returns False if nothing evictable remains. Amortised O(log n) per freed item.
        """
        policy, ghosts = self.policy, self.ghosts
        while (item := policy.victim(kind)) is not None and item.node.locks:
            policy.discard(item, evicted=False)
            self._withheld.add(item)
        if item is None:
            return False
        node = item.node
        self.stats.evictions += 1
        if item.kind == "checkpoint" and node.children:
            self._drop_checkpoint(node)
        else:
            self._drop_leaf(node)
        if ghosts.num_bytes > ghosts.limit_bytes:
            ghosts.trim()
        return True

    def reset(self) -> None:
        """Remove everything that is not locked, ghosts included. O(tree).

        Running leases stay valid: the cache keeps the prefixes that they have locked, their rows
        and their slots. Abort them first if the memory lost its contents. A step plan that was
        taken but not carried out is forgotten, because its rows and states are lost.

        Raises:
            RuntimeError: there is such a plan, and something is held or locked. Nothing is changed.
        """
        plan = self.steps.open_plan
        is_used = (
            self._locked_len
            or self._pages.num_taken > self.cached_tokens
            or self._slots.num_taken > self.num_checkpoints
        )
        if plan is not None and not plan.is_done and is_used:
            raise RuntimeError(NOT_CARRIED_OUT)
        while self.evict_next():
            pass
        self.ghosts.clear()
        if plan is not None:
            plan.was_begun, self.steps.open_plan = True, None

    def rebuilt(self) -> HybridRadixCache:
        """Return a new, empty cache in place of this one, which an exception in the middle of a
        call has left half changed. This one must not be used any more.

        The new cache has the same configuration, memory, statistics and listeners, and an eviction
        policy without history. Leases, locks and matches of this one are worth nothing: ending them
        changes nothing in the new cache. After an exception in this call, repeat it. O(rows).
        RuntimeError unless ``build_prefix_cache`` made this cache.
        """
        if self.make is None:
            raise RuntimeError("only a cache of build_prefix_cache can be rebuilt")
        new = self.make()
        new.stats, new.now, new.num_items = self.stats, self.now, self.num_items
        new.stats.rebuilds += 1
        new.stats.evicted_tokens = new.stats.inserted_tokens
        new.stats.evicted_slots = new.stats.inserted_slots
        for listener in self._listeners:
            listener.followed = None
            new.subscribe(listener)
            new._notify_one(listener, "cleared")
        return new

    def take_step(self) -> StepPlan:
        """Return all work on the tensors that is due before the next step, once.

        The owner of the tensors carries it out before computing: ``take_step().carry_out(memory)``.
        Rows and slots returned by the cache are valid for a step only if a plan was taken after
        they were returned. A caller without tensors calls ``take_step().done()``, because plans
        accumulate otherwise. O(transfers + rows written).

        Raises:
            RuntimeError: the last plan was not carried out.
        """
        return self.steps.take()

    def load(self, resumable: Resumable) -> bool:
        """Return False, because this cache has no offload tiers; see ``TieredRadixCache.load``."""
        return False

    def _can_free(self, wanted_bytes: int, wanted_tokens: int) -> bool:
        """Return whether eviction could free enough.

        Under a shared budget this is for ``wanted_bytes``, else for ``wanted_tokens``. O(1) if it
        could even if locks shared no path, else as ``protected``.
        """
        pages, budget = self._pages, self._pages.budget
        if budget is None:
            short_tokens = wanted_tokens - pages.num_free
        else:
            num_slots = self.num_checkpoints - self._locked_slots
            wanted_bytes -= budget.free_bytes + num_slots * self._slots.unit_bytes
            short_tokens = -(-wanted_bytes // pages.unit_bytes)
        if short_tokens <= self.cached_tokens - self._locked_len:
            return True
        return short_tokens <= self.cached_tokens - self.protected().num_tokens

    def _drop_checkpoint(self, node: RadixNode) -> None:
        """Free the checkpoint of an unlocked node, which keeps the evicted item as a tombstone."""
        checkpoint = node.checkpoint
        assert checkpoint is not None
        if self._listeners:
            self._notify("checkpoint_removed", node)
        self.policy.discard(checkpoint, evicted=True)
        node.checkpoint = None
        node.lost_checkpoint = checkpoint
        has_successor = checkpoint.superseded and not checkpoint.num_successors
        if not has_successor or checkpoint.stop_reason == SESSION_END:
            self._review(node)
        self._is_cached[checkpoint.slot] = 0
        self.num_checkpoints -= 1
        self.stats.evicted_slots += 1
        self._slots.free(checkpoint.slot)

    def _drop_leaf(self, leaf: RadixNode) -> None:
        """Free the KV and checkpoint of an unlocked leaf, and the stateless nodes above it, because
        nothing could resume from those any more.

        They become ghosts and pass their recency up. O(nodes freed, and those up to a checkpoint).
        """
        kv = leaf.kv
        assert kv is not None
        self.policy.discard(kv, evicted=True)
        if leaf.checkpoint is not None:
            self._drop_checkpoint(leaf)
        freed: list[bytes] = []
        while kv is not None:
            if leaf.pins:  # Of a returned lock. A ghost may be split, and has no pins then.
                self.protected()
            parent = leaf.parent
            assert parent is not None
            above = parent.kv
            if self._listeners:
                self._notify("kv_removed", leaf)
            freed.append(kv.rows)
            if above is not None:
                above.uses += kv.uses
                above.last_used = max(above.last_used, kv.last_used)
            if self._row_index is not None:
                self._row_index.remove(kv)
            leaf.kv = None
            kv.rows = b""  # a policy's queue may hold the edge for a while yet
            self._tree.fade(leaf)
            self.ghosts.add(leaf, freed[-1])
            if parent.children is not None:
                if type(parent.children) is RadixNode:  # The path does not fork any more.
                    self._review(parent)
                break
            if parent.checkpoint is not None or parent.locks or not self._has_states:
                if above is not None:
                    self.policy.add(above)
                break
            leaf, kv = parent, above
        rows = np.frombuffer(b"".join(freed), INT32)
        self._pages.free(rows)
        self.cached_tokens -= len(rows)
        self.stats.evicted_tokens += len(rows)

    # --- Publishing -------------------------------------------------------------------------------

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

        The rows ``kv_indices[:owned_from]`` belong to the tree, under a lock of the caller; the
        caller holds the others. Ownership of the held rows passes to the cache, except for
        ``duplicates`` and rows past ``inserted_len``. Ownership of the slots passes to the cache,
        except for ``rejected_slots``. ``labels`` are the placement labels of the checkpoints: one
        each, or none at all. ``after`` is a locked node with the path ``tokens[:owned_from]``
        (``match.node``, later ``result.node``). The walk then starts there and takes O(n -
        owned_from) instead of O(n). A new checkpoint or fork adds the nodes up to the nearest
        checkpoint above.

        Not checked: that the caller holds the rows, that the tree owns those below ``owned_from``,
        and that ``after`` belongs to these tokens and this namespace. ``check`` finds rows and
        slots out of range or with two owners.

        Raises:
            ValueError: ``kv_indices`` is not int32[n], ``labels`` are of another number than the
                checkpoints, the tree has fewer tokens than ``owned_from``, ``after`` is not locked,
                or a slot is free or the cache's.
        """
        if type(tokens) is not np.ndarray or tokens.dtype is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        if type(kv_indices) is not np.ndarray or (kv_indices.dtype, kv_indices.ndim) != (INT32, 1):
            require_int32(kv_indices, "KV indices")
        if len(kv_indices) != len(tokens):
            raise ValueError(
                f"{len(kv_indices)} kv_indices for {len(tokens)} tokens: give one each"
            )
        if labels and len(labels) != len(checkpoints):
            raise ValueError(
                f"{len(labels)} labels for {len(checkpoints)} checkpoints: give one each, or none"
            )
        for number in (owned_from, *chain.from_iterable(checkpoints)):
            if type(number) is not int:
                require_index(number, "owned_from, and each position and slot,")
        base = self._usable(after)
        if base is not None and not base.locks:
            raise ValueError("after is not locked: keep its lock until insert returns")
        while base is not None and base.end > owned_from:
            base = base.parent
        names = labels or ("",) * len(checkpoints)
        saves = [(one, Placed(one[0], name)) for one, name in zip(checkpoints, names, strict=True)]
        ids = tokens[0 if base is None else base.end :].tobytes()
        return self.publish(ids, kv_indices, saves, namespace, owned_from, base)

    def publish(
        self,
        ids: bytes,
        kv_indices: Indices,
        saves: Collection[tuple[tuple[int, int], Placed]],
        namespace: Hashable,
        owned_from: int,
        base: RadixNode | None,
    ) -> InsertResult:
        """As ``insert``, without checks of types and locks: for leases. ``ids`` are the tokens
        after ``base``, a node on the path that ends at ``owned_from`` or before, or None for the
        root. ``saves`` are the checkpoints, as (position, slot)."""
        num_tokens = len(kv_indices) - len(kv_indices) % self.page_size
        ends, accepted, rejected = [num_tokens], [], list[int]()
        step = self.checkpoint_grid
        for save in saves:
            position, slot = save[0]
            if self._is_cached[slot] or not self._slots.is_taken[slot]:
                raise ValueError(f"slot {slot} is free or the cache's: take one with allocate_slot")
            if self.needs_states and position % step == 0 and 0 < position <= num_tokens:
                ends.append(position)
                accepted.append(save)
            else:
                rejected.append(slot)
        if not self._keeps:
            return InsertResult(0, EMPTY, tuple(rejected), None)
        node = base if base is not None else self._tree.root(namespace)
        first = node.end
        node, inside, kv_match_len = self._tree.walk(node, ids, first)
        if owned_from > kv_match_len:
            raise ValueError(
                f"owned_from is {owned_from}, but the cache holds only {kv_match_len} of these "
                "tokens: keep a lock on rows that the cache owns"
            )
        if inside is not None:
            node = self._split(inside, kv_match_len)
        leaf, kv = node, node.kv
        if kv_match_len < num_tokens:
            if kv is not None and node.children is None:  # It is a leaf no more.
                self._withdraw(kv)
            ends.sort()
            leaf = self._append(node, ids, first, kv_indices, ends)
            num_new = num_tokens - kv_match_len
            self.cached_tokens += num_new
            self.stats.inserted_tokens += num_new
            if type(node.children) is dict and len(node.children) == 2:
                self._review(node)
        elif kv is not None:
            kv.last_used = self.now
            if not node.children and kv not in self._withheld:
                self.policy.touch(kv)
        node = leaf
        for (position, slot), placed in sorted(accepted, key=itemgetter(0), reverse=True):
            while (above := node.parent) is not None and above.end >= position:
                node = above
            if node.end > position:
                node = self._split(node, position)
            if node.checkpoint is None:
                self._store_checkpoint(node, slot, placed, position <= kv_match_len)
            else:
                rejected.append(slot)
        if kv_match_len < num_tokens and leaf.children is None and leaf.kv is not None:
            self.policy.add(leaf.kv)
        duplicates = kv_indices[owned_from:kv_match_len] if kv_match_len > owned_from else EMPTY
        last = None if leaf.parent is None else leaf
        return InsertResult(num_tokens, duplicates, tuple(rejected), last)

    def replace_rows(self, node: NodeHandle, start: int, rows: Indices) -> Indices:
        """Point the tokens from ``start`` on, on the path to ``node``, to ``rows``, int32[k].

        For a page or block that was copied, as copy-on-write does: the tree keeps the copy, so the
        original becomes free unless another path uses it. ``rows`` are whole pages that the caller
        holds and has written with the same KV. Returns the former rows, which the caller holds from
        then on: free them when nothing reads them any more. Other paths through these tokens are
        pointed to ``rows`` too. Leases that resumed here keep the former row numbers. This is not a
        use: no recency changes. O(nodes from ``node`` up to ``start`` + k).

        Not checked: that the caller holds ``rows``. ``check`` finds rows with two owners.

        >>> import numpy as np
        >>> from hybridcache import CacheConfig, build_prefix_cache
        >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=4))
        >>> prompt = np.arange(8, dtype=np.int32)
        >>> node = cache.insert(prompt, cache.allocate_kv(8), [(8, cache.allocate_slot())]).node
        >>> copy = cache.allocate_kv(4)
        >>> former = cache.replace_rows(node, 4, copy)
        >>> cache.gather(node)[4:].tolist() == copy.tolist()
        True
        >>> cache.free_kv(former)
        >>> cache.check(held_tokens=0, held_slots=0)

        Raises:
            ValueError: ``rows`` is not int32[k] of whole pages, or the path does not have the
                tokens [``start``, ``start`` + k). Nothing is changed.
        """
        require_int32(rows, "rows")
        start, end = require_index(start, "start", 0), start + len(rows)
        last, page_size = self._usable(node), self.page_size
        length = node.length if type(node) is PathPart else 0 if last is None else last.end
        if start % page_size or len(rows) % page_size or end > length:
            raise ValueError(
                f"rows must be whole pages of {page_size} rows on a path of {length} tokens (got "
                f"{start} to {end})."
            )
        former = np.empty(len(rows), INT32)
        while last is not None and last.end > start:
            kv, first = last.kv, last.start
            if kv is not None and first < end:
                low, high = max(first, start), min(last.end, end)
                changed = kv.indices.copy()
                part = changed[low - first : high - first]
                former[low - start : high - start] = part
                part[:] = rows[low - start : high - start]
                kv.rows = changed.tobytes()
                if self._row_index is not None:
                    self._row_index.renumbered(kv)
            last = last.parent
        return former

    def label_tip(
        self,
        node: NodeHandle | None,
        stop_reason: str,
        returns_within_s: float | None = None,
        session: str = "",
    ) -> None:
        """Record the end of a request of ``session`` ("" if that is not known) at ``node``.

        The deepest checkpoint of its answer gets the ``stop_reason``, unless that is empty, and a
        ``promise`` with ``returns_within_s``, or none. After ``session_end`` it is superseded: only
        a repetition would resume from it. So are then all checkpoints near ``node`` that only this
        session has used, except those at shared positions (``SHARED``). Names of other namespaces
        are other sessions; within one, whoever knows a session's name can end it.

        There is no such checkpoint if the path forks below it, because then it serves other
        conversations too. O(nodes between), and once per session O(its nodes).
        """
        last = tip = self._usable(node)
        renamed = list[RadixNode]() if last is None else claim(last, session)
        while tip is not None and type(tip.children) is not dict:
            if (item := tip.checkpoint) is None:
                tip = tip.parent
                continue
            item.promise = None
            if returns_within_s is not None:
                now_s = self.policy.clock()
                item.promise = Promise(now_s, now_s + returns_within_s, self.now, item.uses)
            if stop_reason and stop_reason != item.stop_reason:
                item.stop_reason = stop_reason
                self.policy.on_relabelled(item)
                renamed.append(tip)
            break
        if stop_reason == SESSION_END and session and last is not None:
            for ended in mark_ended(last, session):
                self.policy.on_relabelled(ended)
                renamed.append(ended.node)
        for changed in renamed:
            self._review(changed)
            if self._listeners and changed.checkpoint is not None:
                self._notify("checkpoint_relabelled", changed)

    def _append(
        self, node: RadixNode, ids: bytes, first: int, rows: Indices, ends: Sequence[int]
    ) -> RadixNode:
        """Make tokens up to the last of ``ends`` resident with copies of ``rows``, and return the
        new leaf. ``ids`` are the tokens from ``first`` on; ``node`` is on their path.

        Ghosts on the path are revived first, then nodes are added. A new node ends at each of
        ``ends``, where checkpoints follow, so that none is split at once: separate nodes share no
        buffer.
        """
        tree, last, path = self._tree, node, []
        if node.ghosts is not None:
            last, inside, length = tree.walk(node, ids, first, ghosts=True)
            if inside is not None:
                last = tree.split(inside, length)
                self.ghosts.split(last, inside)
            above = last
            while above is not node:
                path.append(above)
                assert above.parent is not None
                above = above.parent
            path.reverse()
            self.ghosts.discard(path)
            tree.revive(path)
        for end in ends:
            if last.end < end:
                edge = ids[(last.end - first) * TOKEN_BYTES : (end - first) * TOKEN_BYTES]
                last = tree.grow(last, edge)
                path.append(last)
        self._store_rows(path, rows, 0)
        return last

    def _store_rows(self, path: Sequence[RadixNode], rows: Indices, first: int) -> None:
        """Make the nodes of ``path`` resident with copies of their ``rows``, which begin at the
        position ``first``.

        Callers count the tokens, and add the KV to the policy if the last node is still a leaf.
        """
        serial, now, item_bytes = self.num_items, self.now, self.item_bytes
        start = path[0].end - len(path[0].edge) // TOKEN_BYTES - first
        index, listeners = self._row_index, self._listeners
        for node in path:
            end = node.end - first
            node.kv = Edge(node, rows[start:end].tobytes(), now, serial, item_bytes)
            if index is not None:
                index.new[serial] = node.kv
            if listeners:
                self._notify("kv_stored", node)
            start, serial = end, serial + 1
        self.num_items = serial

    def _store_checkpoint(
        self, node: RadixNode, slot: int, what: Placed | Checkpoint, offered: bool
    ) -> None:
        """Store ``slot`` as the checkpoint of ``node``: a placed one, or the one that a tier had,
        with its uses and its stop reason.

        ``offered`` is True if the policy holds the KV of ``node`` as a candidate. O(nodes down to
        the next checkpoint, or else up to it).
        """
        serial, self.num_items = self.num_items, self.num_items + 1
        checkpoint = Checkpoint(node, slot, self.now, serial, self.item_bytes)
        checkpoint.label, checkpoint.distance = what.label, what.distance
        if isinstance(what, Checkpoint):
            checkpoint.uses, checkpoint.earlier_uses = what.uses, what.earlier_uses
            checkpoint.stop_reason, checkpoint.session = what.stop_reason, what.session
        self._is_cached[slot] = 1
        self.num_checkpoints += 1
        self.stats.inserted_slots += 1
        revives = node.kv if offered and not node.children else None
        if revives is not None:
            self._withdraw(revives)
        checkpoint.superseded = is_superseded(checkpoint)
        is_deepest = not checkpoint.superseded or checkpoint.stop_reason == SESSION_END
        before = last_checkpoint(node) if is_deepest else None
        node.checkpoint = checkpoint
        if before is not None:
            self._review(before.node)
        if node.locks:
            self._locked_slots += 1
        if (lost := node.lost_checkpoint) is not None:
            # ``uses`` is that of ``lost`` already if a tier had it, else 0.
            checkpoint.earlier_uses = lost.earlier_uses + lost.uses - checkpoint.uses
            checkpoint.session = lost.session
            node.lost_checkpoint = None
        self.policy.add(checkpoint)
        if revives is not None:
            self.policy.add(revives)
        if self._listeners:
            self._notify("checkpoint_stored", node)

    def _split(self, lower: RadixNode, position: int) -> RadixNode:
        """Split a resident node with its KV rows. O(tokens of the node)."""
        upper, kv = self._tree.split(lower, position), lower.kv
        assert kv is not None
        upper.pins = 1 if lower.pins else 0
        serial, rows, cut = self.num_items, kv.rows, len(upper.edge)
        upper.kv = Edge(upper, rows[:cut], kv.created, serial, self.item_bytes)
        self.num_items += 1
        kv.rows = rows[cut:]
        if self._row_index is not None:
            self._row_index.new[serial] = upper.kv
        if self._listeners:
            self._notify("kv_split", upper, lower)
        return upper

    def _review(self, node: RadixNode) -> None:
        """Update whether the last checkpoint at or above ``node`` is superseded, after a change
        there, and notify the policy of a change. O(nodes between it and the next deeper one)."""
        item = last_checkpoint(node)
        if item is None:
            return
        superseded = item.num_successors > 0 or is_superseded(item)
        if superseded == item.superseded:
            return
        is_candidate = item not in self._withheld
        if is_candidate:
            self.policy.discard(item, evicted=False)
        item.superseded = superseded
        if is_candidate:
            self.policy.add(item)

    def _withdraw(self, item: Item) -> None:
        """Remove ``item`` from the candidates."""
        if item in self._withheld:
            self._withheld.discard(item)
        else:
            self.policy.discard(item, evicted=False)

    # --- Listeners --------------------------------------------------------------------------------

    def subscribe(self, listener: Listener) -> None:
        """Notify ``listener`` of everything that is cached, and of every later change. O(tree).

        Raises:
            ValueError: it is already subscribed, to this cache or another.
            Exception: the error of the listener, which is then not subscribed.
        """
        if listener.followed is not None:
            raise ValueError(
                "this listener is subscribed already, to this cache or another: unsubscribe it "
                "first, or make one for each cache"
            )
        for node in self._tree.nodes():
            if node.kv is not None:
                listener.kv_stored(node)
            if node.checkpoint is not None:
                listener.checkpoint_stored(node)
        self._listeners = (*self._listeners, listener)
        listener.followed = self

    def unsubscribe(self, listener: Listener) -> None:
        """Stop notifying ``listener``. ValueError if it is not subscribed. O(listeners)."""
        if listener not in self._listeners:
            raise ValueError("this listener is not subscribed")
        self._listeners = tuple(one for one in self._listeners if one is not listener)
        listener.followed = None

    def _notify(self, change: str, *what: object) -> None:
        """Call the method ``change`` of each listener. One that raises is unsubscribed, and the
        logger ``hybridcache`` reports the error."""
        for listener in self._listeners:
            self._notify_one(listener, change, *what)

    def _notify_one(self, listener: Listener, change: str, *what: object) -> None:
        try:
            if listener.followed is self:  # Another one, or itself, may have ended it.
                getattr(listener, change)(*what)
        except Exception:
            if listener.followed is self:
                self.unsubscribe(listener)
            import logging  # not at the top: it is needed here alone

            logging.getLogger("hybridcache").exception(
                "%r raised when notified of %s: it is notified no more", listener, change
            )

    # --- Invariants -------------------------------------------------------------------------------

    def candidates(self) -> Iterator[Item]:
        """Iterate over the items that the policy must hold, found from scratch. O(tree)."""
        for node in self._tree.nodes():
            if node.checkpoint is not None and node.checkpoint not in self._withheld:
                yield node.checkpoint
            if node.kv is not None and not node.children and node.kv not in self._withheld:
                yield node.kv

    def check(self, held_tokens: int | None = None, held_slots: int | None = None) -> None:
        """Recompute every invariant from scratch. O(tree + pools).

        With ``held_*`` this includes ``free + cached + held == total``. It consists of ``assert``
        statements, so it finds nothing under ``python -O``.

        Raises:
            AssertionError: an invariant fails; the message names the first.
        """
        self._tree.check(self.ghosts)
        edges, checkpoints = list[Edge](), list[Checkpoint]()
        for node in self._tree.nodes():
            edges += [] if node.kv is None else [node.kv]
            checkpoints += [] if node.checkpoint is None else [node.checkpoint]
        for one in checkpoints:
            assert one.position % self.checkpoint_grid == 0, f"{one} is off the grid"
            expected = one.num_successors > 0 or is_superseded(one)
            assert one.superseded == expected, f"{one} superseded: {not expected}"
            promise = one.promise
            is_past = promise is None or (promise.uses <= one.uses and promise.made <= self.now)
            assert is_past, f"{one} has a promise of later time: {promise}"
        self._check_rows(edges)
        self._check_slots([one.slot for one in checkpoints])
        self._check_locks()
        self._check_candidates()
        plan = self.steps.open_plan
        assert plan is None or plan.is_done, "the last step plan was taken but not carried out"
        serials = [item.serial for item in (*edges, *checkpoints)]
        assert len(set(serials)) == len(serials), "two items share a serial"
        assert all(serial < self.num_items for serial in serials), "a serial from the future"
        assert self._keeps or not edges, "a cache that keeps nothing has entries"
        held = self._pages.num_taken - self.cached_tokens
        assert held_tokens in (None, held), f"{held} KV rows held, the caller has {held_tokens}"
        held = self._slots.num_taken - self.num_checkpoints
        assert held_slots in (None, held), f"{held} slots held, the caller has {held_slots}"

    def _check_locks(self) -> None:
        """Check the count of locked rows without settling it: pending changes are a part."""
        pending = self._unsettled
        locked_len = num_tokens = num_slots = 0
        for node in self._tree.nodes():
            pins = (node.locks > 0) - pending.get(node, 0)
            pins += sum(child.pins > 0 for child in members(node.children))
            assert node.pins == pins, f"{node} has {node.pins} pins, not {pins}"
            assert node.kv is not None or not (pins or node in pending), f"ghost {node} is pinned"
            num_tokens += (node.end - node.start) * (pins > 0)
            num_slots += node.locks > 0 and node.checkpoint is not None
            locked_len += node.end * (node.locks > 0)
        counted = self._locked_tokens, self._locked_slots, self._locked_len
        found = num_tokens, num_slots, locked_len
        assert counted == found, f"tokens, slots and paths locked: {found}, counted {counted}"

    def _check_candidates(self) -> None:
        for item in self._withheld:
            assert item.node.locks, f"{item} is withheld but not locked"
            assert item in (item.node.kv, item.node.checkpoint), f"{item} is withheld but gone"
        listed = self.policy.candidates()
        if listed is not None:
            held, due = list(listed), set(self.candidates())
            assert len(set(held)) == len(held), "the policy holds an item twice"
            assert due == set(held), f"the policy lacks or must not hold {due ^ set(held)}"

    def _check_rows(self, edges: list[Edge]) -> None:
        pages, counted = self._pages, self.cached_tokens
        pages.check()
        cached = np.frombuffer(b"".join(edge.rows for edge in edges), INT32)
        assert len(cached) == counted, f"{len(cached)} rows cached, counted {counted}"
        is_in_range = cached.min(initial=0) >= 0 and cached.max(initial=-1) < pages.capacity
        assert is_in_range, "a cached row is out of range"
        both = np.concatenate([cached, pages.free_rows()])
        assert are_distinct(both), "a KV row is cached twice, or cached and free"
        if self._row_index is not None and self.arena is not None:
            self._row_index.check(edges)
            self.arena.check_taken(cached)
            assert self._row_index in self.arena.holders, "the tree is not notified of moves"
        if pages.budget is not None:
            taken = pages.num_taken * pages.unit_bytes
            taken += self._slots.num_taken * self._slots.unit_bytes
            free = pages.budget.total_bytes - taken
            counted = pages.budget.free_bytes
            assert free == counted >= 0, f"{free} bytes free, counted {counted}"

    def _check_slots(self, cached: list[int]) -> None:
        slots = self._slots
        slots.check()
        owned = [slot for slot, is_cached in enumerate(self._is_cached) if is_cached]
        assert sorted(cached) == owned, "the slots of the cache are not those of its nodes"
        assert len(cached) == self.num_checkpoints, f"{self.num_checkpoints} checkpoints counted"
        both = cached + slots.free_slots()
        assert len(set(both)) == len(both), "a slot is cached twice, or cached and free"
