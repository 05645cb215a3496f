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
['kv', 0, None, None, 0, 8, 3594083504, 0, 0]
['kv', 1, 0, None, 8, 10, 3848290950, 0, 0]
['checkpoint', 0, 0, '', 0, 0]
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any
from zlib import crc32

import numpy as np

from hybridcache.allocators.pools import ArenaAllocator
from hybridcache.radix.api import Listener
from hybridcache.radix.tree import NodeHandle, RadixNode

Record = list[Any]
"""Name of the change, then its fields as plain data. README.md lists all records."""

MAX_CELLS = 2048
"""Maximum number of cells that show the arena; a cell of a larger one shows several slabs."""
MAX_LETTERS = 80
"""Maximum length of a namespace or a label. Longer ones are truncated."""


class Recorder(Listener):
    """Collects changes until ``take``. O(1) per change, O(nodes above) per new edge."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self.nodes: dict[int, RadixNode] = {}
        """Resident nodes by id."""
        self._saved: set[int] = set()
        """Ids of those with a checkpoint."""

    def take(self) -> list[Record]:
        """Return the changes since the last call."""
        records, self._records = self._records, []
        return records

    def kv_stored(self, node: RadixNode) -> None:
        kv = node.kv
        assert kv is not None
        self.nodes[kv.serial], name = node, show_namespace(node.namespace)
        place = [kv.serial, node_id(node.parent), name, node.start, node.end]
        self._records.append(["kv", *place, _key(node), kv.uses, kv.last_used])

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        self.nodes[upper.serial] = upper
        self._records.append(["split", lower.serial, upper.serial, upper.end, _key(lower)])

    def kv_removed(self, node: RadixNode) -> None:
        del self.nodes[node.serial]
        self._records.append(["kv-gone", node.serial])

    def checkpoint_stored(self, node: RadixNode) -> None:
        saved = node.checkpoint
        assert saved is not None
        label = saved.title[:MAX_LETTERS]
        record = ["checkpoint", node.serial, saved.slot, label, saved.uses, saved.last_used]
        self._records.append(record)
        self._saved.add(node.serial)

    checkpoint_relabelled = checkpoint_stored

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._saved.discard(node.serial)
        self._records.append(["checkpoint-gone", node.serial])

    def cleared(self) -> None:
        self._records += [["checkpoint-gone", serial] for serial in self._saved]
        deepest_first = sorted(self.nodes, key=lambda serial: -self.nodes[serial].end)
        self._records += [["kv-gone", serial] for serial in deepest_first]
        self.nodes.clear()
        self._saved.clear()


def node_id(node: NodeHandle | None) -> int | None:
    """Return the number that names a node in records; None for a root and an evicted node."""
    return node.kv.serial if isinstance(node, RadixNode) and node.kv is not None else None


def show_namespace(namespace: Hashable) -> str | None:
    """Return a namespace as shown on the page, or None for the unnamed one."""
    return None if namespace is None else str(namespace)[:MAX_LETTERS]


def _key(node: RadixNode) -> int:
    """Return a checksum by which the page recognises ghosts that return, without their tokens."""
    return crc32(repr(node.key).encode())


def slabs_record(arena: ArenaAllocator) -> Record:
    """Return the percentage of each cell of slabs that is in use, the cells with more states than
    KV, and the number of slabs in a cell. O(slabs)."""
    each, states = -(-arena.num_slabs // MAX_CELLS) or 1, np.zeros(arena.num_slabs)
    states[list(arena.slots.taken)] = 1.0
    starts = np.arange(0, arena.num_slabs, each)
    kv, states = (
        np.add.reduceat(one, starts) for one in (arena.occupancy() / arena.slab_rows, states)
    )
    percent = np.ceil(100 * (kv + states) / np.diff([*starts, arena.num_slabs]))
    return ["slabs", percent.astype(int).tolist(), np.flatnonzero(states > kv).tolist(), each]
