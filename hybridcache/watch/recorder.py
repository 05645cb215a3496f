"""Records for the page: changes of a cache, requests, and arena slabs.

>>> import numpy as np
>>> from hybridcache import CacheConfig, build_prefix_cache
>>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=1))
>>> recorder = Recorder()
>>> cache.subscribe(recorder)

One insertion gives three records:

>>> prompt = np.arange(10, dtype=np.int32)
>>> result = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
>>> for record in recorder.take():
...     print(record)
['kv', 0, None, None, 0, 8, 4108050209, 0, 0]
['kv', 1, 0, None, 8, 10, 4194326291, 0, 0]
['checkpoint', 0, 0, '', 0, 0]
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from zlib import crc32

from hybridcache.allocators.arena import ArenaAllocator
from hybridcache.api import Listener
from hybridcache.radix.tree import NodeHandle, RadixNode

Record = list[Any]
"""Name of the change, then its fields as plain data. README.md lists all records."""

MAX_SLABS = 2048
"""Maximum number of slabs shown."""
MAX_LETTERS = 80
"""Maximum length of a namespace or a label. Longer ones are truncated."""


class Recorder(Listener):
    """Collects changes until ``take``. O(1) per change, plus a checksum per new segment."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._names: dict[int, str | None] = {}
        self.nodes: dict[int, RadixNode] = {}
        """Resident nodes by id."""

    def take(self) -> list[Record]:
        """Return the changes since the last call."""
        records, self._records = self._records, []
        return records

    def kv_stored(self, node: RadixNode) -> None:
        parent, kv = node.parent, node.kv
        assert parent is not None and kv is not None
        above = node_id(parent)
        name = show_namespace(parent.key) if above is None else self._names[above]
        self._names[kv.serial], self.nodes[kv.serial] = name, node
        place = [kv.serial, above, name, node.start, node.end]
        self._records.append(["kv", *place, _key(node), kv.uses, kv.last_used])

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        id_, new = _id(lower), _id(upper)
        self._names[new], self.nodes[new] = self._names[id_], upper
        self._records.append(["split", id_, new, upper.end, _key(lower)])

    def kv_removed(self, node: RadixNode) -> None:
        id_ = _id(node)
        del self._names[id_], self.nodes[id_]
        self._records.append(["kv-gone", id_])

    def checkpoint_stored(self, node: RadixNode) -> None:
        saved = node.checkpoint
        assert saved is not None
        label = saved.label[:MAX_LETTERS]
        record = ["checkpoint", _id(node), saved.slot, label, saved.uses, saved.last_used]
        self._records.append(record)

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._records.append(["checkpoint-gone", _id(node)])


def node_id(node: NodeHandle | None) -> int | None:
    """Return the number that names a node in records; None for a root and an evicted node."""
    return node.kv.serial if isinstance(node, RadixNode) and node.kv is not None else None


def show_namespace(namespace: Hashable) -> str | None:
    """Return a namespace as shown on the page, or None for the unnamed one."""
    return None if namespace is None else str(namespace)[:MAX_LETTERS]


def _id(node: RadixNode) -> int:
    assert node.kv is not None
    return node.kv.serial


def _key(node: RadixNode) -> int:
    """Return a checksum that distinguishes a node from its siblings without its tokens.

    The page uses it to recognise ghosts that return.
    """
    return crc32(repr(node.key).encode())


def slabs_record(arena: ArenaAllocator) -> Record:
    """Return the percentage of rows with KV of each slab, and the slabs with a state. O(slabs +
    holes)."""
    percent = (100 * arena.occupancy()[:MAX_SLABS] / arena.slab_rows).round()
    states = sorted(slot for slot in arena.slots.taken if slot < MAX_SLABS)
    return ["slabs", percent.astype(int).tolist(), states]
