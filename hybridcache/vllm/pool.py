"""vLLM's block pool, with a radix tree over its blocks that chooses the victims.

The tree knows prompts by vLLM's own chained block hashes, so that adapters, salts and images
separate prompts exactly as in vLLM. One *unit* (``--prefix-match-unit``) is one page of ``WORDS``
tokens of the tree: the first bytes of its hash. A table has the block of each page. A *slot* is one
block in each state group.

Invariants, checked by ``BlockTree.check``:

- A block that nobody uses has a key in vLLM's hash map if and only if the tree owns it: rows or a
  state. Blocks without a key are at the front of vLLM's free queue.
- On each path, the block of the last unit of a span of ``block_size`` tokens holds all units of the
  span. Hence a hit needs one block per span.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from vllm.v1.core.block_pool import BlockPool

from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.radix.api import Listener, PrefixMatch
from hybridcache.radix.cache import LockHandle
from hybridcache.radix.protocol import Placed
from hybridcache.radix.tokens import INT32, Tokens

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from hybridcache.radix.tree import RadixNode

    States = dict[int, tuple[Placed, list[KVCacheBlock]]]
    """States to publish, by position in tokens: labels and blocks, one per state group."""
    Tables = Sequence[Sequence[KVCacheBlock]]
    """Blocks of a request by group."""

WORDS = 4
"""Tokens of the tree per unit: int32 words of its hash."""


def ids_of(request: Any, num_tokens: int, unit: int) -> Tokens:
    """Return the tree's tokens of the whole units of the first ``num_tokens`` of ``request``."""
    # Each hash is cut to its first words.
    hashes = np.array(request.block_hashes[: num_tokens // unit], f"S{4 * WORDS}")
    return hashes.view(INT32)


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
    def block_units(self) -> int:
        return self.block_size // self.unit

    def rows(self, num_tokens: int) -> int:
        """Return the rows of the whole units of ``num_tokens``."""
        return num_tokens // self.unit * WORDS

    def tokens(self, num_rows: int) -> int:
        """Return the tokens of the whole units of ``num_rows``."""
        return num_rows // WORDS * self.unit


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

    def get_new_blocks(self, num_blocks: int) -> Any:
        if num_blocks <= self.get_num_free_blocks():
            while self.num_unowned(num_blocks) < num_blocks:
                self.tree.evict()
        return super().get_new_blocks(num_blocks)

    def move_block_hashes(self, src_block: KVCacheBlock, dst_block: KVCacheBlock) -> None:
        super().move_block_hashes(src_block, dst_block)
        self.tree.state_moved(src_block, dst_block)

    def _emit_block_removed_events(self, block_hashes: list[Any]) -> None:
        # Another block may still have the key: for listeners nothing is removed then.
        keys = self.cached_block_hash_to_block
        super()._emit_block_removed_events([k for k in block_hashes if not keys.get_one_block(k)])


class BlockTree(Listener):
    """HybridRadixCache over the blocks of a pool."""

    def __init__(self, pool: HybridPool, layout: Layout, eviction: str) -> None:
        self.pool, self.layout = pool, layout
        num_blocks, num_states = pool.num_gpu_blocks, len(layout.states)
        row_bytes = layout.block_bytes * len(layout.attention) // layout.rows(layout.block_size)
        config = CacheConfig(
            num_kv_tokens=num_blocks * layout.rows(layout.block_size),
            num_slots=num_blocks // num_states + 1,
            kv_bytes_per_token=max(row_bytes, 1),
            state_bytes=layout.block_bytes * num_states,
            page_size=WORDS,
            grid=WORDS,
            eviction=eviction,
        )
        self.cache = build_prefix_cache(config)
        self.cache.subscribe(self)
        self.block_of = np.zeros(num_blocks * layout.block_units, np.int32)
        """Block of the first attention group, by page of the tree."""
        self.num_units = np.zeros(num_blocks, np.int32)
        """Number of the tree's units, by block of the first attention group."""
        self.peers: dict[int, list[KVCacheBlock]] = {}
        """Blocks of the other attention groups, by the block of the first one."""
        self.states: dict[int, list[KVCacheBlock]] = {}
        """Blocks of each slot, one per state group."""
        self.slot_of: dict[int, int] = {}
        """Slot of each block of a state."""
        self.locks: dict[str, LockHandle] = {}
        """Lock on the published prompt of each running request."""

    def owns(self, block: KVCacheBlock) -> bool:
        """Return whether the tree has units or a state in a block of the first attention group or
        of a state group."""
        return block.block_id in self.slot_of or bool(self.num_units[block.block_id])

    def kv_removed(self, node: RadixNode) -> None:
        assert node.kv is not None
        self._release(self.block_of[node.kv.indices[::WORDS] // WORDS])

    def checkpoint_removed(self, node: RadixNode) -> None:
        assert node.checkpoint is not None
        self._drop_state(node.checkpoint.slot)

    def _release(self, blocks: np.ndarray) -> None:
        """Note that the tree has lost one unit in each of ``blocks``, and drop those that have
        none."""
        found, counts = np.unique(blocks, return_counts=True)
        self.num_units[found] -= counts
        for block in found[self.num_units[found] == 0].tolist():
            for one in (self.pool.blocks[block], *self.peers.pop(block, ())):
                self.pool.drop(one)

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
        lock = self.locks.pop(request_id, None)
        if lock is not None:
            self.cache.unlock(lock)

    def find(self, request: Any, num_tokens: int, drop: int) -> tuple[PrefixMatch, PrefixMatch]:
        """Match the first ``num_tokens`` of a request.

        Returns the match, and the match of the longest prefix that may be resumed: with ``drop``
        units less than the matching KV, as EAGLE needs.
        """
        ids = ids_of(request, num_tokens, self.layout.unit)
        # The tree never returns the last token of a prompt, which is computed for its logits.
        if len(ids) < -(-num_tokens // self.layout.unit) * WORDS:
            ids = np.append(ids, np.int32(0))
        match = found = self.cache.match(ids)
        if drop:
            limit = max(match.kv_match_len // WORDS - drop, 0) * WORDS
            if match.cached_len > limit:
                match = self.cache.match(ids[: limit + 1])
        return found, match

    def blocks_of(self, match: PrefixMatch) -> list[list[KVCacheBlock]]:
        """Return the blocks to resume from, one list per group. States are preceded by null
        blocks."""
        layout, pool, size = self.layout, self.pool, self.layout.block_units
        num_groups = len(layout.attention + layout.states)
        groups: list[list[KVCacheBlock]] = [[] for _ in range(num_groups)]
        if match.resumed is None:
            return groups
        pages = self.cache.gather(match.node)[::WORDS] // WORDS
        ends = np.minimum(np.arange(size, len(pages) + size, size), len(pages)) - 1
        first = self.block_of[pages[ends]].tolist()
        groups[layout.attention[0]] = [pool.blocks[one] for one in first]
        for number, group in enumerate(layout.attention[1:]):
            groups[group] = [self.peers[one][number] for one in first]
        for group, block in zip(layout.states, self.states[match.resumed.slot], strict=True):
            groups[group] = [pool.null_block] * (len(first) - 1) + [block]
        return groups

    def publish(self, request: Any, end: int, tables: Tables, states: States) -> set[int]:
        """Store the first ``end`` tokens of ``request``, and ``states``. Returns the positions of
        the stored ones.

        The caller returned or keeps its own references: the tree holds none. Blocks get keys in
        vLLM's map here, if vLLM has given them none. The request's lock moves to the new end.
        """
        layout, cache = self.layout, self.cache
        ids = ids_of(request, end, layout.unit)
        end = layout.tokens(len(ids))
        before = cache.lock_kv(ids)
        known = 0 if before.node is None else before.node.end
        saves = []
        for position, (placed, blocks) in states.items():
            slot = cache.allocate_slot()
            assert slot is not None, "there are as many slots as states fit"
            self.states[slot] = [*blocks]
            for group, block in zip(layout.states, blocks, strict=True):
                self.slot_of[block.block_id] = slot
                self._add_key(request, block, position, group)
            row = layout.rows(position)
            saves.append(((row, slot), placed._replace(position=row)))
        spans = np.arange(known // WORDS, len(ids) // WORDS) // layout.block_units
        rows = cache.allocate_kv(len(spans) * WORDS)
        assert rows is not None, "there is a row for each word of each block"
        table = np.array([one.block_id for one in tables[layout.attention[0]]], np.int32)
        new = self.block_of[rows[::WORDS] // WORDS] = table[spans]
        np.add.at(self.num_units, new, 1)
        for span in dict.fromkeys(spans.tolist()):
            self._own_span(request, tables, span, min((span + 1) * layout.block_size, end))
        rows = np.append(cache.gather(before.node), rows)
        result = cache.publish(ids[known:].tobytes(), rows, saves, None, known, before.node)
        self.unlock(request.request_id)
        self.locks[request.request_id] = cache.lock(result.node)
        cache.unlock(before)
        for slot in result.rejected_slots:
            cache.free_slot(slot)
            self._drop_state(slot)
        return {layout.tokens(row) for (row, slot), _ in saves if slot in self.states}

    def _own_span(self, request: Any, tables: Tables, span: int, end: int) -> None:
        """Note the attention blocks of a span that the tree has up to ``end``, and add keys."""
        blocks = [tables[group][span] for group in self.layout.attention]
        if len(blocks) > 1:
            self.peers[blocks[0].block_id] = blocks[1:]
        for group, block in zip(self.layout.attention, blocks, strict=True):
            if block.block_hash is None:
                self._add_key(request, block, end, group)

    def _add_key(self, request: Any, block: KVCacheBlock, end: int, group: int) -> None:
        self.pool.cache_partial_block(request, block, end, group, self.layout.block_size)

    def block_copied(self, request: Any, tables: Tables, at: int) -> None:
        """Point the tree to the request's copy of the attention block that its hit at ``at`` ended
        in, so that the original becomes free unless another path uses it."""
        layout, lock = self.layout, self.locks.get(request.request_id)
        span, end = at // layout.block_size, layout.rows(at)
        if lock is None or lock.node is None or lock.node.end < end:
            return
        start = span * layout.rows(layout.block_size)
        pages = self.cache.gather(lock.node)[start:end:WORDS] // WORDS
        former, copy = self.block_of[pages], tables[layout.attention[0]][span].block_id
        former = former[former != copy]
        if len(former):
            self.block_of[pages] = copy
            self.num_units[copy] += len(former)
            self._own_span(request, tables, span, at)
            self._release(former)

    def state_moved(self, src: KVCacheBlock, dst: KVCacheBlock) -> None:
        """Note that vLLM copies a saved state from ``src`` to ``dst`` in this step."""
        slot = self.slot_of.pop(src.block_id, None)
        if slot is not None:
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
        peers = {block.block_id for blocks in self.peers.values() for block in blocks}
        assert all(self.num_units[block] for block in self.peers), "stale peers"
        is_front = True
        for block in self.pool.free_block_queue.get_all_free_blocks():
            is_owned = self.owns(block) or block.block_id in peers
            assert (block.block_hash is not None) == is_owned, f"{block} has a key: {not is_owned}"
            assert is_front or is_owned, f"{block} is not at the front of the queue"
            is_front = is_front and not is_owned
