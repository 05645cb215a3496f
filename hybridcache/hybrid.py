"""HybridRadixCache: one radix tree over two resources, KV rows and state checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from math import lcm

import numpy as np

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
    Offload,
    PrefixMatch,
    Protected,
    Resumable,
    introduce,
    joined,
    members_of,
)
from hybridcache.policies.protocol import EvictionPolicy, Item, raise_failure
from hybridcache.radix.ghosts import GhostList, read_ghosts
from hybridcache.radix.tree import (
    TOKEN_BYTES,
    Checkpoint,
    Family,
    ItemBytes,
    NodeHandle,
    PathPart,
    RadixNode,
    RadixTree,
    edge_tokens,
    first_page,
    ghosts_above,
    members,
)
from hybridcache.residency import (
    Residency,
    append,
    check_cache,
    make_room_for_kv,
    make_room_for_slot,
    place,
    refresh,
    refuse_bad_insert,
)
from hybridcache.tokens import INT32, Indices, Tokens, require_int32

NO_INDICES: Indices = np.empty(0, np.int32)
NO_INDICES.setflags(write=False)

EVICTED = (
    "the node of this match or result was evicted: match again, and lock the node before the next "
    "eviction"
)


def own(node: NodeHandle | None) -> RadixNode | None:
    """Return the tree's node in which ``node`` ends. Raises ValueError for another object."""
    if node is None or isinstance(node, RadixNode):
        return node
    if not isinstance(node, PathPart):
        kind = type(node).__name__
        raise ValueError(f"expected a node that this cache returned, got {kind}")
    return node.last()


class HybridRadixCache:
    """Prefix cache for models with linear-attention layers: resumes where KV *and* a state exist.

    Made by ``build_prefix_cache``. Checkpoints are at multiples of ``grid``, in whole pages.
    ``policy`` orders evictions. A cache is not thread-safe.

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

    >>> receipt = cache.lock(match.node)
    >>> cache.evict(num_tokens=10)
    Eviction(num_tokens=2, num_slots=0)
    >>> cache.unlock(receipt)
    >>> cache.check(held_tokens=0, held_slots=0)
    """

    def __init__(
        self,
        pages: PageAllocator,
        slots: SlotAllocator,
        policy: EvictionPolicy,
        *,
        grid: int,
        item_bytes: ItemBytes,
        ghost_bytes: int = 0,
    ) -> None:
        self.page_size = pages.page_size
        self.grid = grid
        self.stats = CacheStats()
        self._step = lcm(grid, pages.page_size)
        self.arena = arena_of(pages)
        self.offload: Offload | None = None
        self._pages = pages
        self._slots = slots
        self._num_slots = slots.capacity
        self._residency = Residency(pages, slots, policy, item_bytes, ghost_bytes, self.stats)
        self._tree = self._residency.tree
        self._gathered = self._residency.gathered
        self.steps = step_queue_of(pages)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(cached_tokens={self.cached_tokens}, "
            f"free_tokens={self.free_tokens}, num_checkpoints={self.num_checkpoints}, "
            f"free_slots={self.free_slots}, policy={self.policy})"
        )

    def match(self, tokens: Tokens, namespace: Hashable = None) -> PrefixMatch:
        """Look up how much of ``tokens`` is cached, and the causes of the losses. Changes nothing.
        O(n).

        >>> from hybridcache import CacheConfig, build_prefix_cache
        >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
        >>> cache.match(np.arange(10, dtype=np.int32)).losses.never_seen
        10
        """
        if getattr(tokens, "dtype", None) is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        raise_failure(self._residency.policy.failure)
        num_tokens = len(tokens)
        root = self._tree.find_root(namespace)
        if root is None:
            losses = Losses(num_tokens, 0, 0, 0, 0)
            return PrefixMatch(num_tokens, 0, 0, 0, None, losses, None, namespace)
        node: RadixNode | None
        node, inside, kv_match_len = self._tree.walk(root, tokens)
        seen_len = kv_match_len
        missed: Checkpoint | None = None
        forks = inside is not None or bool(node.children)
        if inside is None and node.ghosts:
            seen_len, missed, forks = read_ghosts(self._tree, node, tokens)
        lost_len = 0
        while node is not root:
            assert node is not None
            if node.end < num_tokens:
                if node.checkpoint is not None:
                    break
                if not lost_len and node.lost_checkpoint is not None:
                    lost_len = node.end
                    missed = missed or node.lost_checkpoint
            node = node.parent
        cached_len = 0 if node is root else node.end
        reachable = min(kv_match_len, num_tokens - 1)
        saved_len = max(cached_len, lost_len)
        grid_len = max(saved_len, reachable - reachable % self._step)
        losses = Losses(
            num_tokens - seen_len,
            seen_len - kv_match_len,
            saved_len - cached_len,
            grid_len - saved_len,
            kv_match_len - grid_len,
        )
        checkpoint = node.checkpoint  # none: the node is the root
        return PrefixMatch(
            num_tokens,
            cached_len,
            kv_match_len,
            seen_len,
            None if checkpoint is None else checkpoint.slot,
            losses,
            None if checkpoint is None else node,
            namespace,
            missed,
            checkpoint,
            forks=forks,
        )

    def continuation(
        self,
        tokens: Tokens,
        max_tokens: int,
        namespace: Hashable = None,
        after: NodeHandle | None = None,
    ) -> Tokens:
        """Return up to ``max_tokens`` ids that followed ``tokens`` before; see
        ``PrefixCache.continuation``.

        O(n), or O(tokens past ``after``).

        >>> from hybridcache import CacheConfig, build_prefix_cache
        >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
        >>> _ = cache.insert(np.arange(10, dtype=np.int32), cache.allocate_kv(10))
        >>> cache.continuation(np.arange(4, dtype=np.int32), 3).tolist()
        [4, 5, 6]
        """
        if getattr(tokens, "dtype", None) is not INT32 or tokens.ndim != 1:
            require_int32(tokens, "tokens")
        node = own(after) if after is not None else self._tree.find_root(namespace)
        while node is not None and node.end > len(tokens):
            node = node.parent
        if node is None:
            return NOTHING
        return continuation(node, tokens[node.end :], max_tokens, self.page_size)

    def gather(self, node: NodeHandle | None) -> Indices:
        """Return the KV indices from the root to the end of ``node``: int32[position], read-only.

        O(position). The latest results are kept, because a request and its next turn need the same
        rows again.

        Raises:
            ValueError: ``node`` was evicted, or belongs to another cache.
        """
        last = own(node)
        if last is None:
            return NO_INDICES
        self._refuse_unusable(last)
        assert last.kv is not None
        known = self._gathered.rows.get(last.kv)
        if known is not None:
            return known
        return self._gathered.join(last.kv, self._residency.cached_tokens)

    def fetch(self, resumable: Resumable) -> bool:
        """Return False, because this cache has no offload tiers."""
        return False

    def touch(self, match: PrefixMatch, resumes: bool = False) -> None:
        """Record one request: refresh its checkpoint and KV, and count its hits and losses.

        A request that ``resumes`` was counted before. O(1), plus the nodes between the checkpoint
        and the ghost that was missed.
        """
        residency = self._residency
        residency.now += 1
        if not resumes:
            self.stats.record(match)
        node = own(match.node)
        if node is not None:
            residency.use(node)
        if match.missed is not None:
            policy = residency.policy
            policy.on_ghost_hit(match.missed)
            # Most policies ignore further ghost hits: then the path is not searched for them.
            is_asked = type(policy).on_ghost_hit_above is not EvictionPolicy.on_ghost_hit_above
            if is_asked and isinstance(match.missed, Checkpoint):
                for ghost in ghosts_above(match.missed.node):
                    policy.on_ghost_hit_above(ghost)

    def lock(self, node: NodeHandle | None) -> LockHandle:
        """Protect ``node``, its checkpoint and the KV of its path. ``node`` may be None. O(1).

        Raises:
            ValueError: ``node`` was evicted, or belongs to another cache.
        """
        last = own(node)
        if last is not None:
            self._refuse_unusable(last)
            self._residency.lock(last)
        return LockHandle(last, self._residency)

    def _refuse_unusable(self, node: RadixNode) -> None:
        if node.kv is None:
            raise ValueError(EVICTED)
        if node.kv.item_bytes is not self._residency.item_bytes:  # each cache has its own object
            raise ValueError("this node belongs to another cache: match the tokens in this one")

    def lock_kv(
        self, tokens: Tokens, namespace: Hashable = None
    ) -> tuple[RadixNode | None, LockHandle]:
        """Protect the cached KV of ``tokens`` without counting a use; see ``PrefixCache.lock_kv``.

        Splits an edge if ``tokens`` end or differ inside it. O(n).
        """
        root = self._tree.find_root(namespace)
        if root is None:
            return None, LockHandle(None, None)
        node, inside, kv_match_len = self._tree.walk(root, tokens)
        if inside is not None and kv_match_len > node.end:
            node = self._residency.split(inside, kv_match_len)
        if node is root:
            return None, LockHandle(None, None)
        return node, self.lock(node)

    def lock_of(self, node: NodeHandle | None) -> LockHandle:
        """Return a handle for a lock that is already held on ``node``, to be unlocked once.

        For callers that keep only nodes. O(1).

        Raises:
            ValueError: ``node`` is not locked.
        """
        last = own(node)
        if last is not None and last not in self._residency.locked:
            raise ValueError("this node is not locked in this cache")
        return LockHandle(last, self._residency)

    def unlock(self, handle: LockHandle) -> None:
        """Return a lock. A second call does nothing. O(1).

        Raises:
            ValueError: another cache returned the handle, or it is not a handle.
        """
        if not isinstance(handle, LockHandle):
            raise ValueError(f"expected the result of lock (got {handle!r})")
        if handle.node is not None:
            if not handle.belongs_to(self._residency):
                raise ValueError("this lock belongs to another cache: unlock it there")
            handle.release()

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
        """Publish ``tokens`` with their rows and checkpoints; see ``PrefixCache.insert``.

        O(n), or O(n - owned_from) with ``after``, a locked node with the path
        ``tokens[:owned_from]``. A new checkpoint or fork adds the nodes up to the nearest
        checkpoint above.

        Raises:
            ValueError: as for ``PrefixCache.insert``; nothing is changed.
        """
        base = own(after)
        refuse_bad_insert(
            tokens,
            kv_indices,
            checkpoints,
            owned_from,
            labels,
            base,
            page_size=self.page_size,
            num_slots=self._num_slots,
        )
        residency, tree, step = self._residency, self._tree, self._step
        num_tokens = len(tokens) - len(tokens) % self.page_size
        while base is not None and base.end > owned_from:
            base = base.parent
        node = base if base is not None else tree.root(namespace)
        inside, kv_match_len = None, node.end
        if node.children is not None:
            node, inside, kv_match_len = tree.walk(node, tokens[kv_match_len:num_tokens])
        if owned_from > kv_match_len:
            tree.prune_root(namespace)
            raise ValueError(
                f"owned_from is {owned_from}, but the cache holds only {kv_match_len} of these "
                "tokens: keep a lock on rows that the cache owns"
            )
        if inside is not None and kv_match_len > node.end:
            node = residency.split(inside, kv_match_len)
        leaf = node
        if kv_match_len < num_tokens:
            residency.expect_child(node)
            rows = kv_indices[kv_match_len:num_tokens]
            leaf = append(residency, step, node, tokens[kv_match_len:num_tokens], rows, checkpoints)
        else:
            refresh(residency, node)
        rejected = (
            place(residency, step, leaf, checkpoints, labels, kv_match_len) if checkpoints else ()
        )
        if kv_match_len < num_tokens:
            residency.offer_leaf(leaf)
        duplicates = (
            kv_indices[owned_from:kv_match_len] if kv_match_len > owned_from else NO_INDICES
        )
        if leaf.parent is None:
            tree.prune_root(namespace)
            return InsertResult(0, duplicates, rejected, None)
        return InsertResult(num_tokens, duplicates, rejected, leaf)

    def label_tip(self, node: NodeHandle | None, stop_reason: str) -> None:
        """Add ``stop_reason`` to the label of the deepest checkpoint at or above ``node``; see
        ``PrefixCache.label_tip``."""
        last = own(node)
        if last is not None:
            self._residency.label_tip(last, stop_reason)

    def announce_checkpoint(self, node: NodeHandle | None) -> Checkpoint | None:
        """Mark the checkpoint that a deeper one below ``node`` will supersede; see
        ``PrefixCache.announce_checkpoint``."""
        last = own(node)
        return None if last is None else self._residency.announce_checkpoint(last)

    def withdraw_announcement(self, announced: Item) -> None:
        """Undo one ``announce_checkpoint``. O(1).

        Raises:
            ValueError: ``announced`` is not an open announcement.
        """
        if not isinstance(announced, Checkpoint) or not announced.num_successors:
            raise ValueError(f"expected an open announcement of a checkpoint (got {announced!r})")
        self._residency.withdraw_announcement(announced)

    def allocate_kv(self, num_tokens: int) -> Indices | None:
        """Take rows for ``num_tokens`` tokens in whole pages, evicting as needed.

        Returns None, with nothing evicted, if that many are not available. O(num_tokens), plus
        O(log n) per evicted item.
        """
        rows = self._pages.allocate(num_tokens)
        if rows is None:
            whole = -(-num_tokens // self.page_size) * self.page_size
            if make_room_for_kv(self._residency, whole):
                return self._pages.allocate(num_tokens)
            self.stats.refusals += 1
        return rows

    def allocate_slot(self) -> int | None:
        """Take one state slot, evicting as needed. Returns None, with nothing evicted, if none is
        available."""
        slot = self._slots.allocate()
        if slot is None:
            if make_room_for_slot(self._residency):
                return self._slots.allocate()
            self.stats.refusals += 1
        return slot

    def make_room(self, num_tokens: int = 0, num_slots: int = 0) -> bool:
        """Evict until ``num_tokens`` rows (whole pages) and one slot, if ``num_slots``, are free.

        Returns False, with nothing evicted for the part that failed, if locks or other holders
        prevent it. For callers that allocate from the pools themselves. O(log n) per evicted item.
        """
        if num_slots > 1:
            raise ValueError(f"make_room frees one slot at a time (got num_slots={num_slots}).")
        residency = self._residency
        if num_tokens > self.free_tokens and not make_room_for_kv(residency, num_tokens):
            return False
        return num_slots <= self.free_slots or make_room_for_slot(residency)

    def protected(self) -> Protected:
        """Return how much of the cached memory is under locks; see ``PrefixCache.protected``."""
        return self._residency.locked_paths.protected()

    def iter_nodes(self) -> Iterator[RadixNode]:
        """Iterate over the nodes, parents before children; see ``PrefixCache.iter_nodes``."""
        return self._tree.nodes()

    def roots(self) -> list[RadixNode]:
        """Return the root of each namespace, the oldest first; ``root.key`` is the namespace."""
        return list(self._tree.roots.values())

    def refresh(self, node: NodeHandle | None) -> None:
        """Count a use of ``node`` without a request: its recency changes, no statistics. O(1)."""
        last = own(node)
        if last is not None:
            self._residency.use(last)

    def install(
        self, tree: RadixTree, ghosts: Iterable[RadixNode], *, now: int, num_items: int
    ) -> None:
        """Fill this empty cache with the nodes of ``tree``, as an earlier cache left them.

        For readers of files that describe a cache. The rows and slots named in the tree are taken
        from the allocators. ``ghosts`` are its nodes without KV, the oldest first; call
        ``ghosts.trim()`` once all of them have been read. ``now`` and ``num_items`` are added to
        the clock of this cache. The policy and the subscribers are notified of everything. O(tree +
        pools).

        Raises:
            ValueError: the cache is not empty, or the pools lack a row or slot. Nothing is changed.
        """
        if self.num_nodes:
            raise ValueError("only an empty cache can be filled; reset() it first")
        self._residency.install(tree, ghosts, now, num_items)

    def take_step(self) -> StepPlan:
        """Return the work on the tensors that is due before the next step; see
        ``PrefixCache.take_step``. O(transfers + rows written)."""
        return self.steps.take()

    def free_kv(self, kv_indices: Indices) -> None:
        """Return held rows, whole pages. O(n)."""
        self._pages.free(kv_indices)

    def free_slot(self, slot: int) -> None:
        """Return a held slot. O(1)."""
        self._slots.free(slot)

    def evict(self, num_tokens: int = 0, num_slots: int = 0) -> Eviction:
        """Evict until that much was freed or nothing evictable remains. O(log n) per item.

        >>> from hybridcache import CacheConfig, build_prefix_cache
        >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
        >>> cache.evict(num_tokens=50, num_slots=1)
        Eviction(num_tokens=0, num_slots=0)
        """
        stats = self.stats
        tokens, slots = stats.evicted_tokens, stats.evicted_slots
        while stats.evicted_tokens - tokens < num_tokens and self._residency.evict_one("kv"):
            pass
        while stats.evicted_slots - slots < num_slots and self._residency.evict_one("checkpoint"):
            pass
        return Eviction(stats.evicted_tokens - tokens, stats.evicted_slots - slots)

    def reset(self) -> None:
        """Remove everything that is not locked, ghosts included, and forget a plan that was not
        carried out. Running leases stay valid. O(tree)."""
        while self._residency.evict_one(None):
            pass
        self._residency.ghosts.clear()
        self._gathered.clear()
        self.steps.forget_open_plan()

    def check(self, held_tokens: int | None = None, held_slots: int | None = None) -> None:
        """Recompute every invariant from scratch; see ``PrefixCache.check``. O(tree)."""
        check_cache(self._residency, self._step)
        self.steps.check()
        if held_tokens is not None:
            held = self._pages.num_taken - self._residency.cached_tokens
            assert held == held_tokens, f"{held} KV rows held, the caller has {held_tokens}"
        if held_slots is not None:
            held = self._slots.num_taken - self._residency.num_checkpoints
            assert held == held_slots, f"{held} slots held, the caller has {held_slots}"

    def subscribe(self, listener: Listener) -> None:
        """Notify ``listener`` of everything that is cached, and of every later change. O(tree).

        Raises:
            ValueError: it is already subscribed.
        """
        members = members_of(self._residency.listener)
        if listener in members:
            raise ValueError("this listener is subscribed already: unsubscribe it first")
        introduce(listener, self._tree.nodes())
        self._residency.listener = joined((*members, listener))

    def unsubscribe(self, listener: Listener) -> None:
        """Stop notifying ``listener``. O(listeners).

        Raises:
            ValueError: it is not subscribed.
        """
        members = members_of(self._residency.listener)
        if listener not in members:
            raise ValueError("this listener is not subscribed")
        self._residency.listener = joined(tuple(one for one in members if one is not listener))

    def render(self, max_nodes: int = 1000) -> str:
        """Draw the tree as text, one line per node. O(nodes drawn).

        >>> from hybridcache import CacheConfig, build_prefix_cache
        >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2))
        >>> rows = cache.allocate_kv(3)
        >>> result = cache.insert(np.arange(3, dtype=np.int32), rows, namespace="tenant")
        >>> print(cache.render())
        namespace 'tenant'
        `- 0..3
        """
        # Not at the top: few processes ever draw, and all import this file.
        from hybridcache.watch.drawing import render_text

        return render_text(self._tree, max_nodes)

    @property
    def cached_tokens(self) -> int:
        """Number of tokens with KV in the cache. O(1)."""
        return self._residency.cached_tokens

    @property
    def num_checkpoints(self) -> int:
        """Number of state slots that the cache owns. O(1)."""
        return self._residency.num_checkpoints

    @property
    def free_tokens(self) -> int:
        """Number of unallocated KV rows. O(1)."""
        return self._pages.num_free

    @property
    def free_slots(self) -> int:
        """Number of unallocated state slots. O(1)."""
        return self._slots.num_free

    @property
    def has_slots(self) -> bool:
        """False if the cache was built without state slots. O(1)."""
        return self._slots.capacity > 0 or self._slots.budget is not None

    @property
    def policy(self) -> EvictionPolicy:
        """Eviction policy, for inspection."""
        return self._residency.policy

    @property
    def num_nodes(self) -> int:
        """Number of nodes, ghosts included. O(1)."""
        return self._tree.num_nodes

    @property
    def ghosts(self) -> GhostList:
        """Nodes with evicted KV, for inspection."""
        return self._residency.ghosts

    @property
    def item_bytes(self) -> ItemBytes:
        """Bytes of one token's KV and of one state, as used by policies."""
        return self._residency.item_bytes

    @property
    def now(self) -> int:
        """Logical time: number of requests counted so far."""
        return self._residency.now

    @property
    def num_items(self) -> int:
        """Number of items created so far: the serial number of the next one."""
        return self._residency.num_items

    @property
    def ghost_tokens(self) -> int:
        """Number of remembered tokens with evicted KV. O(1)."""
        return self._residency.ghosts.num_tokens


# --- Tokens that followed a path before, ghosts included ------------------------------------------

MAX_BRANCHES = 64
"""Number of children, the newest, that are compared if several continue alike."""
NOTHING: Tokens = np.empty(0, np.int32)
NOTHING.setflags(write=False)


def continuation(node: RadixNode, tokens: Tokens, max_tokens: int, page_size: int) -> Tokens:
    """Return up to ``max_tokens`` ids that followed ``tokens`` after the end of ``node`` before.

    The result is empty if they never did. Changes nothing. At a fork, the child that was used last
    is followed, resident ones before ghosts. O(length of ``tokens``, compared as bytes, plus nodes
    on the path, plus up to ``MAX_BRANCHES`` per fork).
    """
    rest, at, found = tokens.tobytes(), 0, []
    num_missing = max_tokens
    while num_missing > 0:
        child = _next(node, tokens, at, page_size)
        if child is None:
            break
        end = min(at + len(child.edge) // TOKEN_BYTES, len(tokens))
        shared = (end - at) * TOKEN_BYTES
        if child.edge[:shared] != rest[at * TOKEN_BYTES : end * TOKEN_BYTES]:
            break
        if shared < len(child.edge):
            found.append(edge_tokens(child.edge[shared:])[:num_missing])
            num_missing -= len(found[-1])
        node, at = child, end
    return np.concatenate(found) if found else NOTHING


def _next(node: RadixNode, tokens: Tokens, at: int, page_size: int) -> RadixNode | None:
    """Return the child on which ``tokens`` continue at ``at``, or None.

    If less than a page remains, this is the child used last of those that begin with it.
    """
    families = (node.children, node.ghosts)
    if len(tokens) - at >= page_size:
        key = first_page(tokens, at, page_size)
        for family in families:
            child = family.get(key) if isinstance(family, dict) else family
            if child is not None and child.key == key:
                return child
        return None
    start = tokens[at:].tobytes()
    alike = [
        child
        for family in families
        for child in _newest(family)
        if child.edge[: len(start)] == start
    ]
    return max(alike, key=_last_used, default=None)


def _newest(family: Family) -> Iterable[RadixNode]:
    if isinstance(family, dict):
        return islice(reversed(family.values()), MAX_BRANCHES)
    return members(family)


def _last_used(node: RadixNode) -> int:
    return -sys.maxsize if node.kv is None else node.kv.last_used
