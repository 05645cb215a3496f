"""KV events: the changes of a cache as records, for routers.

``EventStream`` turns changes into small records: segment id, parent id, positions and tokens.
``Mirror`` follows a stream and computes match lengths for a router without contacting the replica.
``hybridcache.routing.outbox`` numbers batches of events for a subscriber that can lose some.

>>> import numpy as np
>>> from hybridcache import CacheConfig, build_prefix_cache
>>> from hybridcache.export.mirror import Mirror
>>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=1))
>>> mirror = Mirror(page_size=1)
>>> cache.subscribe(EventStream(mirror.apply))
>>> prompt = np.arange(10, dtype=np.int32)
>>> result = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
>>> mirror.match(prompt)
MirrorMatch(cached_len=8, kv_match_len=10)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from hybridcache.api import Listener
from hybridcache.radix.tree import RadixNode


class KVStored(NamedTuple):
    """KV of a new segment."""

    id: int
    """Segment id. Never reused."""
    parent: int | None
    """Id of the parent segment, or None for the root of the namespace."""
    namespace: Hashable
    start: int
    tokens: tuple[int, ...]


class KVSplit(NamedTuple):
    """Split of a segment: ``id`` keeps the tokens after ``position``; ``upper`` gets the rest."""

    id: int
    upper: int
    position: int


class KVRemoved(NamedTuple):
    """Eviction of a segment's KV. The segment has no children."""

    id: int


class CheckpointStored(NamedTuple):
    """New checkpoint at the end of a segment."""

    id: int
    position: int
    label: str


class CheckpointRemoved(NamedTuple):
    """Removal of the checkpoint at the end of a segment. The KV can remain."""

    id: int
    position: int


Event = KVStored | KVSplit | KVRemoved | CheckpointStored | CheckpointRemoved


class EventStream(Listener):
    """Cache listener that passes each change to ``sink`` as an ``Event``.

    O(tokens) for stored KV, O(1) otherwise. ``sink`` runs in the middle of a cache operation: if it
    raises, the stream is unsubscribed. Let a sink that can fail, such as a socket, read an
    ``Outbox``. Each stream follows one cache.
    """

    def __init__(self, sink: Callable[[Event], None]) -> None:
        if not callable(sink):
            raise TypeError(f"sink must be a function of an event (got {sink!r}).")
        self._sink = sink
        self._namespaces: dict[int, Hashable] = {}
        """Namespace by segment, so that children need no walk to the root."""

    def kv_stored(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        above = None if parent.kv is None else parent.kv.serial
        namespace = parent.key if above is None else self._namespaces[above]
        id_ = _id(node)
        self._namespaces[id_] = namespace
        self._sink(KVStored(id_, above, namespace, node.start, tuple(node.tokens.tolist())))

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        self._namespaces[_id(upper)] = self._namespaces[_id(lower)]
        self._sink(KVSplit(_id(lower), _id(upper), upper.end))

    def kv_removed(self, node: RadixNode) -> None:
        del self._namespaces[_id(node)]
        self._sink(KVRemoved(_id(node)))

    def checkpoint_stored(self, node: RadixNode) -> None:
        assert node.checkpoint is not None
        self._sink(CheckpointStored(_id(node), node.end, node.checkpoint.label))

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._sink(CheckpointRemoved(_id(node), node.end))


def _id(node: RadixNode) -> int:
    assert node.kv is not None
    return node.kv.serial
