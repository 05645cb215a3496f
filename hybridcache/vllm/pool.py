"""vLLM's block pool, with a radix tree over its blocks that chooses the victims.

The tree knows prompts by vLLM's own chained block hashes, so that adapters, salts and images
separate prompts exactly as in vLLM. One *unit* (``--prefix-match-unit``) is ``WORDS`` tokens of the
tree: the first bytes of its hash. A *row* of the tree is one word of one unit in one block: block b
has the rows [b * block_rows, (b + 1) * block_rows). A *slot* is one block in each state group.

Invariants, checked by ``BlockTree.check``:

- A block that nobody uses has a key in vLLM's hash map if and only if the tree owns it: rows or a
  state. Blocks without a key are at the front of vLLM's free queue.
- On each path, the block of the last row of a span of ``block_size`` tokens holds all rows of the
  span. Hence a hit needs one block per span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from vllm.v1.core.block_pool import BlockPool

from hybridcache.allocators.pools import PageAllocator, SlotAllocator
from hybridcache.config import CacheConfig, build_on
from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.cache import LockHandle
from hybridcache.radix.protocol import Placed
from hybridcache.tokens import INT32, Indices

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

WORDS = 4
"""Tokens of the tree per unit: int32 words of its hash."""
HASH_BYTES = WORDS * 4


class Layout(NamedTuple):
    """Blocks of one model."""

    unit: int
    """Tokens per hash: states are saved and hits end at its multiples."""
    block_size: int
    """Tokens per block, in all groups."""
    block_bytes: int
    attention: tuple[int, ...]
    """Numbers of the attention groups."""
    states: tuple[int, ...]
    """Numbers of the state groups."""

    @property
    def block_rows(self) -> int:
        return self.block_size // self.unit * WORDS

    def rows(self, num_tokens: int) -> int:
        """Return the rows of the whole units of ``num_tokens``."""
        return num_tokens // self.unit * WORDS

    def tokens(self, num_rows: int) -> int:
        """Return the tokens of the whole units of ``num_rows``."""
        return num_rows // WORDS * self.unit


class BlockRows(PageAllocator):
    """Rows of the tree. They are taken by number, because vLLM allocates the blocks."""

    def __init__(self, num_blocks: int, layout: Layout, drop: Callable[[int], None]) -> None:
        row_bytes = layout.block_bytes * len(layout.attention) // layout.block_rows
        super().__init__(num_blocks * layout.block_rows, WORDS, row_bytes)
        self.block_rows = layout.block_rows
        self.is_taken = np.zeros((num_blocks, layout.block_rows), bool)
        """True for the rows of the tree, by block."""
        self._drop = drop

    def of(self, block_ids: Sequence[int], num_rows: int) -> Indices:
        """Return the first ``num_rows`` rows of these blocks: int32[num_rows]."""
        first = np.array(block_ids, np.int32) * self.block_rows
        offsets = np.arange(self.block_rows, dtype=np.int32)
        rows: Indices = np.add.outer(first, offsets).reshape(-1)[:num_rows]
        return rows

    def take(self, rows: Indices) -> None:
        """Take ``rows`` for the tree."""
        self.is_taken.reshape(-1)[rows] = True
        self.num_taken += len(rows)

    def free(self, rows: Indices) -> None:
        """Return ``rows``, and drop the blocks that have no more rows of the tree."""
        self.is_taken.reshape(-1)[rows] = False
        self.num_taken -= len(rows)
        blocks = np.unique(rows // self.block_rows)
        for block in blocks[~self.is_taken[blocks].any(1)].tolist():
            self._drop(block)

    def free_rows(self) -> Indices:
        return np.flatnonzero(~self.is_taken).astype(INT32)

    def check(self, num_reserved: int = 0) -> None:
        assert self.is_taken.sum() == self.num_taken, "the rows of the tree are miscounted"


class StateSlots(SlotAllocator):
    """Slots of the tree. ``blocks[slot]`` is one block per state group."""

    def __init__(
        self, num_slots: int, slot_bytes: int, drop: Callable[[KVCacheBlock], None]
    ) -> None:
        super().__init__(num_slots, slot_bytes)
        self.blocks: dict[int, list[KVCacheBlock]] = {}
        self.slot_of: dict[int, int] = {}
        """Slot of each block number."""
        self._drop = drop

    def take(self, blocks: Sequence[KVCacheBlock]) -> int:
        """Take a slot for the state in ``blocks``."""
        slot = self.allocate()
        assert slot is not None, "there are as many slots as states fit"
        self.blocks[slot] = list(blocks)
        self.slot_of.update((block.block_id, slot) for block in blocks)
        return slot

    def free(self, slot: int) -> None:
        super().free(slot)
        for block in self.blocks.pop(slot):
            del self.slot_of[block.block_id]
            self._drop(block)


class HybridPool(BlockPool):
    """vLLM's pool, whose victims the tree chooses. A pool becomes one by its ``__class__``."""

    tree: BlockTree

    def drop(self, block: KVCacheBlock) -> None:
        """Remove the keys of a block, and let an unused one be the next to be taken."""
        self._maybe_evict_cached_block(block)
        if block.ref_cnt == 0 and not block.is_null:
            self.free_block_queue.remove(block)
            self.free_block_queue.prepend_n([block])

    def num_unowned(self, limit: int) -> int:
        """Count the free blocks that the tree does not own, up to ``limit``. O(limit)."""
        queue, count = self.free_block_queue, 0
        block = queue.fake_free_list_head.next_free_block
        while count < limit and block is not queue.fake_free_list_tail and block.block_hash is None:
            block, count = block.next_free_block, count + 1
        return count

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        if num_blocks <= self.get_num_free_blocks():
            while self.num_unowned(num_blocks) < num_blocks:
                self.tree.evict()
        new: list[KVCacheBlock] = super().get_new_blocks(num_blocks)
        return new

    def move_block_hashes(self, src_block: KVCacheBlock, dst_block: KVCacheBlock) -> None:
        super().move_block_hashes(src_block, dst_block)
        self.tree.state_moved(src_block, dst_block)

    def _emit_block_removed_events(self, block_hashes: list[Any]) -> None:
        # Another block may still have the key: for listeners nothing is removed then.
        gone = [
            one for one in block_hashes if not self.cached_block_hash_to_block.get_one_block(one)
        ]
        super()._emit_block_removed_events(gone)


class BlockTree:
    """HybridRadixCache over the blocks of a pool."""

    def __init__(
        self, pool: HybridPool, layout: Layout, eviction: str, clock: Callable[[], float]
    ) -> None:
        self.pool, self.layout = pool, layout
        num_blocks, num_groups = pool.num_gpu_blocks, len(layout.states)
        state_bytes = layout.block_bytes * num_groups
        self.rows = BlockRows(num_blocks, layout, self._drop_rows)
        self.slots = StateSlots(num_blocks // num_groups + 1, state_bytes, pool.drop)
        config = CacheConfig(
            total_bytes=num_blocks * layout.block_bytes,
            kv_bytes_per_token=max(self.rows.unit_bytes, 1),
            state_bytes=state_bytes,
            page_size=WORDS,
            grid=WORDS,
            eviction=eviction,
            debug=False,  # Rows are taken by number here, not by ``allocate_kv``.
        )
        self.cache = build_on(config, self.rows, self.slots)
        self.cache.policy.set_clock(clock)
        self.peers: dict[int, list[KVCacheBlock]] = {}
        """Blocks of the other attention groups, by the block of the first one."""
        self.locks: dict[str, LockHandle] = {}
        """Lock on the published prompt of each running request."""
        self.fresh: set[int] = set()
        """Slots that are written by copies of the current step: no hit may copy them in it."""

    def _drop_rows(self, block_id: int) -> None:
        for block in (self.pool.blocks[block_id], *self.peers.pop(block_id, ())):
            self.pool.drop(block)

    def owns(self, block: KVCacheBlock) -> bool:
        """Return whether the tree has rows or a state in a block of the first attention group or
        of a state group."""
        return block.block_id in self.slots.slot_of or bool(
            self.rows.is_taken[block.block_id].any()
        )

    def evict(self) -> None:
        """Evict one item. If all are locked, return the lock of the oldest request first.

        A lock only saves work: a request keeps its blocks by vLLM's reference counts.
        """
        while not self.cache.evict_next():
            assert self.locks, "free blocks are owned, and nothing is left to evict"
            self.unlock(next(iter(self.locks)))

    def unlock(self, request_id: str) -> None:
        """Return the lock of a request. Does nothing if it has none."""
        lock = self.locks.pop(request_id, None)
        if lock is not None:
            self.cache.unlock(lock)

    def find(self, ids: bytes, num_tokens: int, drop: int) -> tuple[PrefixMatch, PrefixMatch]:
        """Match a prompt of ``num_tokens`` with the hashes ``ids``.

        Returns the match, and the match of the longest prefix that may be resumed: with ``drop``
        units less than the matching KV, as EAGLE needs.
        """
        # The tree never returns the last token of a prompt, which is computed for its logits.
        if len(ids) < -(-num_tokens // self.layout.unit) * HASH_BYTES:
            ids += bytes(4)
        tokens = np.frombuffer(ids, INT32)
        match = found = self.cache.match(tokens)
        if drop:
            limit = max(match.kv_match_len // WORDS - drop, 0) * WORDS
            if match.cached_len > limit:
                match = self.cache.match(tokens[: limit + 1])
        return found, match

    def blocks_of(self, match: PrefixMatch) -> list[list[KVCacheBlock]]:
        """Return the blocks to resume from, one list per group. States are preceded by null
        blocks."""
        layout, pool, size = self.layout, self.pool, self.layout.block_rows
        groups: list[list[KVCacheBlock]] = [
            [] for _ in range(len(layout.attention + layout.states))
        ]
        if match.resumed is None:
            return groups
        rows = self.cache.gather(match.node)
        ends = np.minimum(np.arange(size, len(rows) + size, size), len(rows)) - 1
        first = (rows[ends] // size).tolist()
        groups[layout.attention[0]] = [pool.blocks[one] for one in first]
        for number, group in enumerate(layout.attention[1:]):
            groups[group] = [self.peers[one][number] for one in first]
        for group, block in zip(layout.states, self.slots.blocks[match.resumed.slot], strict=True):
            groups[group] = [pool.null_block] * (len(first) - 1) + [block]
        return groups

    def publish(
        self,
        request: Any,
        ids: bytes,
        tables: Sequence[Sequence[KVCacheBlock]],
        states: dict[int, tuple[Placed, list[KVCacheBlock]]],
    ) -> set[int]:
        """Store the prefix of ``request`` with the hashes ``ids``, and the states at these
        positions in tokens. Returns the stored positions.

        The caller returned or keeps its own references: the tree holds none. Blocks get keys in
        vLLM's map here, if vLLM has given them none. The request's lock moves to the new end.
        """
        layout, cache = self.layout, self.cache
        num_rows = len(ids) // 4
        tokens = np.frombuffer(ids, INT32)
        before = cache.lock_kv(tokens)
        known = 0 if before.node is None else before.node.end
        saves = []
        for position, (placed, blocks) in states.items():
            for group, block in zip(layout.states, blocks, strict=True):
                self._add_key(request, block, position, group)
            row = layout.rows(position)
            saves.append(((row, self.slots.take(blocks)), placed._replace(position=row)))
        ids_of_first = [block.block_id for block in tables[layout.attention[0]]]
        rows = self.rows.of(ids_of_first, num_rows)
        self.rows.take(rows[known:])
        result = cache.publish(ids[known * 4 :], rows, saves, None, known, before.node)
        new_spans = range(known // layout.block_rows, -(-num_rows // layout.block_rows))
        for span in new_spans if known < num_rows else ():
            end = min((span + 1) * layout.block_size, layout.tokens(num_rows))
            self._own_span(request, tables, span, end)
        self.unlock(request.request_id)
        self.locks[request.request_id] = cache.lock(result.node)
        cache.unlock(before)
        for slot in result.rejected_slots:
            self.slots.free(slot)
        return {layout.tokens(row) for (row, slot), _ in saves if slot in self.slots.blocks}

    def _own_span(
        self, request: Any, tables: Sequence[Sequence[KVCacheBlock]], span: int, end: int
    ) -> None:
        """Note the attention blocks of a span that the tree has up to ``end``, and add keys."""
        blocks = [tables[group][span] for group in self.layout.attention]
        if len(blocks) > 1:
            self.peers[blocks[0].block_id] = blocks[1:]
        for group, block in zip(self.layout.attention, blocks, strict=True):
            if block.block_hash is None:
                self._add_key(request, block, end, group)

    def _add_key(self, request: Any, block: KVCacheBlock, position: int, group: int) -> None:
        self.pool.cache_partial_block(request, block, position, group, self.layout.block_size)

    def block_copied(self, request: Any, tables: Sequence[Sequence[KVCacheBlock]], at: int) -> None:
        """Point the tree to the request's copy of the attention block that its hit at ``at`` ended
        in, so that the original becomes free unless another path uses it."""
        layout, lock = self.layout, self.locks.get(request.request_id)
        span, end = at // layout.block_size, layout.rows(at)
        if lock is None or lock.node is None or lock.node.end < end:
            return
        start = span * layout.block_rows
        rows = self.rows.of([tables[layout.attention[0]][span].block_id], end - start)
        former = self.cache.gather(lock.node)[start:end]
        is_new = rows != former
        if is_new.any():
            self.rows.take(rows[is_new])
            self.cache.replace_rows(lock.node, start, rows)
            self._own_span(request, tables, span, at)
            self.rows.free(former[is_new])

    def state_moved(self, src: KVCacheBlock, dst: KVCacheBlock) -> None:
        """Note that vLLM copies a saved state from ``src`` to ``dst`` in this step."""
        slot = self.slots.slot_of.pop(src.block_id, None)
        if slot is not None:
            blocks = self.slots.blocks[slot]
            blocks[blocks.index(src)] = dst
            self.slots.slot_of[dst.block_id] = slot
            self.fresh.add(slot)

    def check(self) -> None:
        """Check all invariants. O(blocks + tree)."""
        self.cache.check(held_tokens=0, held_slots=0)
        pool, layout = self.pool, self.layout
        peers = {block.block_id for blocks in self.peers.values() for block in blocks}
        owned = set(np.flatnonzero(self.rows.is_taken.any(1)).tolist())
        assert self.peers.keys() <= owned, "stale peers"
        is_front = True
        for block in pool.free_block_queue.get_all_free_blocks():
            is_owned = self.owns(block) or block.block_id in peers
            assert (block.block_hash is not None) == is_owned, f"{block} has a key: {not is_owned}"
            assert is_front or is_owned, f"{block} is not at the front of the queue"
            is_front = is_front and not is_owned
        for node in self.cache.iter_nodes():
            if node.kv is None or node.children:
                continue
            rows = self.cache.gather(node)
            for start in range(0, len(rows), layout.block_rows):
                span = rows[start : start + layout.block_rows]
                offsets = span % layout.block_rows
                assert (offsets == np.arange(len(span))).all(), "a row is at another place"
