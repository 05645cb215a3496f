"""vLLM's block pool: blocks of equal size, content keys, and one free queue in the order of
reuse."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable


class BlockPool:
    """``num_blocks`` blocks, all free at first. A free block keeps its content until it is
    allocated again.

    A block may have several keys (of a full block, and of a part of it that can be resumed). A key
    may belong to several blocks: content computed twice is stored twice. Every operation is O(1)
    per block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._keys_of: dict[int, list[Hashable]] = {}
        self._length_of: dict[int, int] = {}
        self._blocks_of: dict[Hashable, dict[int, None]] = {}

    def lookup(self, key: Hashable) -> int | None:
        """Return the block that has held ``key`` longest, or None."""
        blocks = self._blocks_of.get(key)
        return next(iter(blocks)) if blocks else None

    def take(self, block: int) -> None:
        """Add a reference to a block; a free one leaves the queue with its content."""
        if self._references[block] == 0:
            del self.free[block]
        self._references[block] += 1

    def allocate(self) -> int:
        """Return the block at the head of the free queue, without its content. Raises KeyError if
        none is free."""
        block, _ = self.free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Remove one reference from each block. Unreferenced blocks are queued last, in the order
        given, or first if they have no content."""
        empty = []
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self.free[block] = None
                if block not in self._keys_of:
                    empty.append(block)
        for block in reversed(empty):
            self.free.move_to_end(block, last=False)

    def register(self, block: int, key: Hashable, length: int) -> None:
        """Register ``block`` under ``key``, which ends ``length`` tokens into the text. A key
        longer than the block's first one replaces all its keys (the block has grown); a shorter one
        is added."""
        keys = self._keys_of.get(block, ())
        if key in keys:
            return
        if keys and self._length_of[block] < length:
            self._forget(block)
        if block not in self._keys_of:
            self._keys_of[block] = []
            self._length_of[block] = length
        self._keys_of[block].append(key)
        self._blocks_of.setdefault(key, {})[block] = None

    def move(self, source: int, target: int) -> None:
        """Move the keys of ``source`` to ``target``, which has none."""
        length = self._length_of[source]
        for key in self._forget(source):
            self.register(target, key, length)

    def check(self) -> None:
        """Check that every block is either referenced or free, and that keys and blocks refer to
        each other. Raises AssertionError otherwise. O(blocks)."""
        held = sum(count > 0 for count in self._references)
        assert held + len(self.free) == self.num_blocks, "blocks: held + free != all"
        assert all(self._references[block] == 0 for block in self.free), "a held block is free"
        named = {(block, key) for block, keys in self._keys_of.items() for key in keys}
        kept = {(block, key) for key, blocks in self._blocks_of.items() for block in blocks}
        assert named == kept, "keys and blocks do not name each other"

    def _forget(self, block: int) -> list[Hashable]:
        """Remove all keys of ``block`` and return them."""
        keys = self._keys_of.pop(block, [])
        self._length_of.pop(block, None)
        for key in keys:
            blocks = self._blocks_of[key]
            del blocks[block]
            if not blocks:
                del self._blocks_of[key]
        return keys
