"""vLLM's block pool, with a radix tree over its blocks that chooses the victims.

The tree knows prompts by vLLM's own chained block hashes, so that adapters, salts and images
separate prompts exactly as in vLLM. One *unit* (``--prefix-match-unit``) is one page of ``WORDS``
tokens of the tree: the first bytes of its hash. A table has the block of each page. A *slot* is one
block in each state group.

Invariants, checked by ``BlockTree.check``:

- A block has a key in vLLM's hash map if and only if the tree owns it: rows or a state. Unused
  blocks without a key are at the front of vLLM's free queue.
- On each path, the block of the last unit of a span of ``block_size`` tokens holds all units of the
  span. Hence a hit needs one block per span.

KV events have the unit for their block size. Rows are reported as the tree gets and loses them,
with the unit before them as parent, and a state as the unit that it ends. So a consumer that
follows parents knows each unit that a hit can end at, and a hit needs a state of each group there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from vllm.distributed.kv_events import BlockRemoved
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    generate_block_hash_extra_keys,
    get_group_id,
    maybe_convert_block_hash,
)

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.radix.api import Listener, PrefixMatch
from hybridcache.radix.cache import LockHandle
from hybridcache.radix.protocol import Placed
from hybridcache.radix.tokens import INT32, Tokens
from hybridcache.radix.tree import RadixNode

Derived = TypeVar("Derived")
States = dict[int, tuple[Placed, list[KVCacheBlock]]]
"""States to publish, by position in tokens: labels and blocks, one per state group."""
Tables = Sequence[Sequence[KVCacheBlock]]
"""Blocks of a request by group."""
WORDS = 4
"""Tokens of the tree per unit: int32 words of its hash."""


def ids_of(request: Any, first: int, end: int) -> Tokens:
    """Return the tree's tokens of the units [``first``, ``end``) of ``request``."""
    # Each hash is cut to its first words.
    return np.array(request.block_hashes[first:end], f"S{4 * WORDS}").view(INT32)


class Layout(NamedTuple):
    """Blocks of one model."""

    unit: int
    """Tokens per hash: states are saved and hits end at its multiples."""
    block_size: int
    """Tokens per block, in all groups."""
    block_bytes: int
    drop: int
    """Number of units that are dropped from the end of each hit (EAGLE)."""
    attention: int
    """Number of the attention group."""
    states: tuple[int, ...]
    """Numbers of the state groups."""

    @property
    def block_units(self) -> int:
        return self.block_size // self.unit

    def rows(self, num_tokens: int) -> int:
        """Return the rows of the whole units of ``num_tokens``."""
        return num_tokens // self.unit * WORDS

    def tokens(self, num_rows: int) -> int:
        """Return the tokens of the whole units of ``num_rows``."""
        return num_rows // WORDS * self.unit


class Offer(NamedTuple):
    """Saved state for a KV connector."""

    request: Any
    position: int
    """Number of tokens before the state."""
    is_shared: bool
    """True for forks and boundaries, at which prompts of other sessions resume."""
    row: KVCacheBlock
    """Block of the request that has the attention rows before the position."""
    slot: int
    blocks: list[KVCacheBlock]
    """Blocks of the slot. The tree keeps this list as long as it keeps the state."""

    def entries(self, layout: Layout) -> list[tuple[int, int, int]]:
        """Return group, block and position for each group of states."""
        pairs = zip(layout.states, self.blocks, strict=True)
        return [(group, block.block_id, self.position) for group, block in pairs]


def derive(made: Any, cls: type[Derived]) -> Derived:
    """Give an object that vLLM has made the class ``cls``, and return it.

    vLLM makes its cache manager, block pool and offloading scheduler itself, and has no parameter
    for their classes. ``cls`` has methods and no ``__init__``: its fields are set by the caller.
    Raises TypeError if vLLM, or another plug-in, has made something else.
    """
    if type(made) not in cls.__bases__:
        raise TypeError(
            f"hybridcache derives {cls.__name__} from vLLM's {cls.__bases__[0].__name__} (got "
            f"{type(made).__name__}). Drop the other plug-in, or --scheduler-cls."
        )
    made.__class__ = cls
    assert isinstance(made, cls)
    return made


class HybridPool(BlockPool):
    """vLLM's pool, whose victims the tree chooses."""

    tree: BlockTree

    def drop(self, block: KVCacheBlock) -> None:
        """Remove the keys of a block, and let an unused one be the next to be taken."""
        self._maybe_evict_cached_block(block)
        if block.ref_cnt == 0 and not block.is_null:
            self.free_block_queue.remove(block)
            self.free_block_queue.prepend_n([block])

    def num_unowned(self, limit: int) -> int:
        """Count the free blocks that the tree does not own, up to ``limit``. O(limit)."""
        count, limit = 0, min(limit, self.get_num_free_blocks())
        block = self.free_block_queue.fake_free_list_head.next_free_block
        while count < limit and block.block_hash is None:
            block, count = block.next_free_block, count + 1
        return count

    def get_new_blocks(self, num_blocks: int) -> Any:
        while self.num_unowned(num_blocks) < min(num_blocks, self.get_num_free_blocks()):
            self.tree.evict()
        return super().get_new_blocks(num_blocks)

    def move_block_hashes(self, src_block: KVCacheBlock, dst_block: KVCacheBlock) -> None:
        super().move_block_hashes(src_block, dst_block)
        self.tree.state_moved(src_block, dst_block)

    def _emit_block_removed_events(self, block_hashes: list[Any]) -> None:
        # Rows are reported by the tree. Another block may still have the key of a state: for
        # listeners nothing is removed then.
        keys, rows = self.cached_block_hash_to_block, self.tree.layout.attention
        gone = [k for k in block_hashes if get_group_id(k) != rows and not keys.get_one_block(k)]
        super()._emit_block_removed_events(gone)

    def report_rows(self, request: Any, first: int, end: int) -> None:
        """Report the units [``first``, ``end``) of ``request`` as stored."""
        layout, hashes = self.tree.layout, request.block_hashes
        if not self.enable_kv_cache_events or first >= end:
            return
        named = [maybe_convert_block_hash(one) for one in hashes[max(first - 1, 0) : end]]
        # In vLLM 0.32 the hash of a unit covers no tokens behind it.
        of_lookahead = getattr(self, "_generate_event_extra_keys", None)
        extra_keys = of_lookahead or generate_block_hash_extra_keys
        extra, image = [], 0
        for start in range(first * layout.unit, end * layout.unit, layout.unit):
            keys, image = extra_keys(request, start, start + layout.unit, image)
            extra.append(keys)
        event = self._build_block_stored_event(
            request,
            block_hashes=named[first > 0 :],
            parent_block_hash=named[0] if first else None,
            start_token_idx=first * layout.unit,
            end_token_idx=end * layout.unit,
            block_size=layout.unit,
            kv_cache_group_id=layout.attention,
            extra_keys_list=extra,
            **({"lookahead_token_ids": None} if of_lookahead else {}),
        )
        self.kv_event_queue.append(event)


class BlockTree(Listener):
    """HybridRadixCache over the blocks of a pool."""

    def __init__(self, pool: HybridPool, layout: Layout, eviction: str) -> None:
        self.pool, self.layout = pool, layout
        num_blocks, num_states = pool.num_gpu_blocks, len(layout.states)
        config = CacheConfig(
            num_kv_tokens=num_blocks * layout.rows(layout.block_size),
            num_slots=num_blocks // num_states + 1,
            kv_bytes_per_token=max(layout.block_bytes // layout.rows(layout.block_size), 1),
            state_bytes=layout.block_bytes * num_states,
            page_size=WORDS,
            grid=WORDS,
            eviction=eviction,
        )
        self.cache = build_prefix_cache(config)
        self.cache.subscribe(self)
        self.block_of = np.zeros(num_blocks * layout.block_units, np.int32)
        """Attention block of each page of the tree."""
        self.num_units = np.zeros(num_blocks, np.int32)
        """Number of the tree's units in each attention block."""
        self.states: dict[int, list[KVCacheBlock]] = {}
        """Blocks of each slot, one per state group."""
        self.slot_of: dict[int, int] = {}
        """Slot of each block of a state."""
        self.hashes: dict[int, Any] = {}
        """Block hash of each page of the tree, if events are sent."""
        self.locks: dict[str, LockHandle] = {}
        """Lock on the published prompt of each running request."""

    def kv_removed(self, node: RadixNode) -> None:
        assert node.kv is not None
        pages, pool = node.kv.indices[::WORDS] // WORDS, self.pool
        self._release(self.block_of[pages])
        if pool.enable_kv_cache_events:
            gone = [maybe_convert_block_hash(self.hashes.pop(page)) for page in pages.tolist()]
            pool.kv_event_queue.append(
                BlockRemoved(gone, medium=pool.medium, group_idx=self.layout.attention)
            )

    def checkpoint_removed(self, node: RadixNode) -> None:
        assert node.checkpoint is not None
        self._drop_state(node.checkpoint.slot)

    def _release(self, blocks: np.ndarray) -> None:
        """Note that the tree has lost one unit in each of ``blocks``, and drop those that have
        none."""
        found, counts = np.unique(blocks, return_counts=True)
        self.num_units[found] -= counts
        for block in found[self.num_units[found] == 0].tolist():
            self.pool.drop(self.pool.blocks[block])

    def _drop_state(self, slot: int) -> None:
        for block in self.states.pop(slot):
            del self.slot_of[block.block_id]
            self.pool.drop(block)

    def evict(self) -> None:
        """Evict one item. If all are locked, return the lock of the oldest request first.

        A lock only saves work: a request keeps its blocks by vLLM's reference counts.
        """
        while not self.cache.evict_next():
            assert self.locks, "free blocks are owned, and nothing is left to evict"
            self.unlock(next(iter(self.locks)))

    def unlock(self, request_id: str) -> None:
        """Return the lock of a request. Does nothing if it has none."""
        if (lock := self.locks.pop(request_id, None)) is not None:
            self.cache.unlock(lock)

    def find(self, request: Any, num_tokens: int) -> tuple[PrefixMatch, PrefixMatch]:
        """Match the first ``num_tokens`` of a request.

        Returns the match, and the match of the longest prefix that may be resumed: with EAGLE, some
        units less than the matching KV.
        """
        ids = ids_of(request, 0, num_tokens // self.layout.unit)
        # The tree never returns the last token of a prompt, which is computed for its logits.
        if len(ids) < -(-num_tokens // self.layout.unit) * WORDS:
            ids = np.append(ids, np.int32(0))
        match = found = self.cache.match(ids)
        if self.layout.drop:
            limit = max(match.kv_match_len // WORDS - self.layout.drop, 0) * WORDS
            if match.cached_len > limit:
                match = self.cache.match(ids[: limit + 1])
        return found, match

    def blocks_of(self, match: PrefixMatch) -> list[list[KVCacheBlock]]:
        """Return the blocks to resume from, one list per group. States are preceded by null
        blocks."""
        layout, pool, size = self.layout, self.pool, self.layout.block_units
        groups: list[list[KVCacheBlock]] = [[] for _ in range(1 + len(layout.states))]
        if match.resumed is None:
            return groups
        pages = self.cache.gather(match.node)[::WORDS] // WORDS
        ends = np.minimum(np.arange(size, len(pages) + size, size), len(pages)) - 1
        rows = [pool.blocks[one] for one in self.block_of[pages[ends]].tolist()]
        groups[layout.attention] = rows
        for group, block in zip(layout.states, self.states[match.resumed.slot], strict=True):
            groups[group] = [pool.null_block] * (len(rows) - 1) + [block]
        return groups

    def rows_of(self, request: Any, num_tokens: int) -> list[KVCacheBlock]:
        """Return the whole attention blocks of the cached KV of the first ``num_tokens`` tokens,
        whether or not there is a state at its end."""
        layout, size = self.layout, self.layout.block_units
        ids = ids_of(request, 0, max(num_tokens // layout.unit - layout.drop, 0))
        with self.cache.lock_kv(ids) as lock:
            pages = self.cache.gather(lock.node)[::WORDS] // WORDS
        return [self.pool.blocks[one] for one in self.block_of[pages[size - 1 :: size]].tolist()]

    def publish(self, request: Any, end: int, tables: Tables, states: States) -> set[int]:
        """Store the first ``end`` tokens of ``request``, and ``states``. Returns the positions of
        the stored ones.

        The caller returned or keeps its own references: the tree holds none. Blocks get keys in
        vLLM's map here, and only here. The request's lock moves to the new end.
        """
        layout, cache = self.layout, self.cache
        num_units = min(end // layout.unit, len(request.block_hashes))
        former = self.locks.pop(request.request_id, None) or cache.lock(None)
        base = former.node
        while base is not None and base.end > num_units * WORDS:
            base = base.parent
        first = 0 if base is None else base.end
        ids = ids_of(request, first // WORDS, num_units)
        saves = []
        for position, (placed, blocks) in states.items():
            slot = cache.allocate_slot()
            assert slot is not None, "there are as many slots as states fit"
            self.states[slot] = [*blocks]
            self.slot_of |= {block.block_id: slot for block in blocks}
            row = layout.rows(position)
            saves.append(((row, slot), placed._replace(position=row)))
        new = cache.allocate_kv(len(ids))
        assert new is not None, "there is a row for each word of each block"
        rows = np.append(np.zeros(first, INT32), new)  # The first ones are not read.
        result = cache.publish(ids.tobytes(), rows, saves, None, first, base)
        self.locks[request.request_id] = cache.lock(result.node)
        cache.unlock(former)
        cache.free_kv(result.duplicates)
        known = first + len(result.duplicates)
        spans = np.arange(known // WORDS, num_units) // layout.block_units
        table = tables[layout.attention]
        numbers = np.array([one.block_id for one in table], np.int32)[spans]
        self.block_of[rows[known::WORDS] // WORDS] = numbers
        np.add.at(self.num_units, numbers, 1)
        for span in range(spans[0], spans[-1] + 1) if len(spans) else ():
            at = min((span + 1) * layout.block_units, num_units) * layout.unit
            self._add_key(request, table[span], at, layout.attention)
        if self.pool.enable_kv_cache_events:
            pages = (rows[known::WORDS] // WORDS).tolist()
            self.hashes.update(zip(pages, request.block_hashes[known // WORDS :], strict=False))
            self.pool.report_rows(request, known // WORDS, num_units)
        for slot in result.rejected_slots:
            cache.free_slot(slot)
            self._drop_state(slot)
        for (row, slot), _ in saves:
            for group, block in zip(layout.states, self.states.get(slot, ()), strict=False):
                self._add_key(request, block, layout.tokens(row), group)
        return {layout.tokens(row) for (row, slot), _ in saves if slot in self.states}

    def _add_key(self, request: Any, block: KVCacheBlock, end: int, group: int) -> None:
        pool, layout = self.pool, self.layout
        sends, is_rows = pool.enable_kv_cache_events, group == layout.attention
        pool.enable_kv_cache_events = sends and not is_rows  # The tree reports rows.
        pool.cache_partial_block(request, block, end, group, layout.block_size)
        pool.enable_kv_cache_events = sends

    def block_copied(self, request: Any, tables: Tables, at: int) -> None:
        """Point the tree to the request's copy of the attention block that its hit at ``at`` ended
        in, so that the original becomes free unless another path uses it."""
        layout, lock = self.layout, self.locks[request.request_id]
        span, end = at // layout.block_size, layout.rows(at)
        start = span * layout.rows(layout.block_size)
        pages = self.cache.gather(lock.node)[start:end:WORDS] // WORDS
        former, copy = self.block_of[pages], tables[layout.attention][span]
        former = former[former != copy.block_id]
        if len(former):
            self.block_of[pages] = copy.block_id
            self.num_units[copy.block_id] += len(former)
            self._add_key(request, copy, at, layout.attention)
            self._release(former)

    def state_moved(self, src: KVCacheBlock, dst: KVCacheBlock) -> None:
        """Note that vLLM copies a saved state from ``src`` to ``dst`` in this step."""
        if (slot := self.slot_of.pop(src.block_id, None)) is not None:
            blocks = self.states[slot]
            blocks[blocks.index(src)] = dst
            self.slot_of[dst.block_id] = slot

    def check(self) -> None:
        """Check all invariants. O(blocks + tree)."""
        self.cache.check(held_tokens=0, held_slots=0)
        size, places = self.layout.block_units, list[int]()
        for node in self.cache.iter_nodes():
            if node.kv is not None:
                units = np.arange(node.start, node.end, WORDS) // WORDS
                blocks = self.block_of[node.kv.indices[::WORDS] // WORDS]
                places += (blocks * size + units % size).tolist()
        assert len(set(places)) == len(places), "two units are at one place"
        counts = np.bincount([place // size for place in places], minlength=len(self.num_units))
        assert (counts == self.num_units).all(), "the units of the tree are miscounted"
        owned = {*self.slot_of, *np.flatnonzero(self.num_units).tolist()}
        keyed = {one.block_id for one in self.pool.blocks if one.block_hash is not None}
        assert keyed == owned, "the blocks with a key are not those of the tree"
        free = [one.block_id in owned for one in self.pool.free_block_queue.get_all_free_blocks()]
        assert free == sorted(free), "blocks without a key are not at the front of the queue"
