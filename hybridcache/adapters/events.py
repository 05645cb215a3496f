"""KV events: the changes of a cache as records, for routers.

``EventStream`` turns changes into small records: edge id, parent id, positions and tokens.
``Mirror`` follows a stream and computes match lengths for a router without contacting the replica.
``hybridcache.adapters.routing.outbox`` numbers batches of events for a subscriber that can lose
some.

>>> import numpy as np
>>> from hybridcache import CacheConfig, build_prefix_cache
>>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=1))
>>> mirror = Mirror(page_size=1)
>>> cache.subscribe(EventStream(mirror.apply))
>>> prompt = np.arange(10, dtype=np.int32)
>>> result = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
>>> mirror.match(prompt)
MirrorMatch(cached_len=8, kv_match_len=10)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from math import lcm
from typing import NamedTuple

import numpy as np

from hybridcache.radix.api import Listener
from hybridcache.radix.tokens import EMPTY, Tokens, require_int32
from hybridcache.radix.tree import Checkpoint, Edge, ItemBytes, RadixNode, RadixTree


class KVStored(NamedTuple):
    """KV of a new edge."""

    id: int
    """Edge id. Never reused."""
    parent: int | None
    """Id of the parent edge, or None for the root of the namespace."""
    namespace: Hashable
    start: int
    tokens: tuple[int, ...]


class KVSplit(NamedTuple):
    """Split of an edge: ``id`` keeps the tokens after ``position``; ``upper`` gets the rest."""

    id: int
    upper: int
    position: int


class KVRemoved(NamedTuple):
    """Eviction of an edge's KV. The edge has no children."""

    id: int


class CheckpointStored(NamedTuple):
    """New checkpoint at the end of an edge."""

    id: int
    position: int
    label: str
    distance: int
    """Label and distance of the placement rule (``Placed``)."""


class CheckpointRemoved(NamedTuple):
    """Removal of the checkpoint at the end of an edge. The KV can remain."""

    id: int
    position: int


Event = KVStored | KVSplit | KVRemoved | CheckpointStored | CheckpointRemoved


class EventStream(Listener):
    """Cache listener that passes each change to ``sink`` as an ``Event``.

    O(tokens + nodes above) for stored KV, O(1) otherwise. ``sink`` runs in the middle of a cache
    operation: if it raises, the stream is unsubscribed. Let a sink that can fail, such as a socket,
    read an ``Outbox``.
    """

    def __init__(self, sink: Callable[[Event], None]) -> None:
        self._sink = sink
        self._ends: dict[int, int] = {}
        """Position at the end of each resident node, by id."""
        self._checkpoints: dict[int, int] = {}

    def kv_stored(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        self._ends[node.serial] = node.end
        above = None if parent.kv is None else parent.kv.serial
        tokens = tuple(node.tokens.tolist())
        self._sink(KVStored(node.serial, above, node.namespace, node.start, tokens))

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        self._ends[upper.serial] = upper.end
        self._sink(KVSplit(lower.serial, upper.serial, upper.end))

    def kv_removed(self, node: RadixNode) -> None:
        del self._ends[node.serial]
        self._sink(KVRemoved(node.serial))

    def checkpoint_stored(self, node: RadixNode) -> None:
        saved = node.checkpoint
        assert saved is not None
        self._checkpoints[node.serial] = node.end
        self._sink(CheckpointStored(node.serial, node.end, saved.label, saved.distance))

    def checkpoint_removed(self, node: RadixNode) -> None:
        del self._checkpoints[node.serial]
        self._sink(CheckpointRemoved(node.serial, node.end))

    def cleared(self) -> None:
        for serial, end in self._checkpoints.items():
            self._sink(CheckpointRemoved(serial, end))
        for serial in sorted(self._ends, key=self._ends.__getitem__, reverse=True):
            self._sink(KVRemoved(serial))
        self._ends.clear()
        self._checkpoints.clear()


# --- Mirror of a cache ----------------------------------------------------------------------------


class EventsLost(ValueError):
    """Raised if a batch of events is not the next one."""


class MirrorMatch(NamedTuple):
    """Match lengths of a prompt in the mirrored cache."""

    cached_len: int
    kv_match_len: int


_NO_BYTES = ItemBytes(0, 0)


class Mirror:
    """Tree of one cache, built from its events.

    After ``EventsLost``, or if its ``EventStream`` is no longer subscribed (``followed`` is None),
    the mirror is stale: a new one must follow a new subscription.
    """

    def __init__(self, page_size: int, kv_grid: int | None = None) -> None:
        """Create an empty mirror.

        Args:
            page_size: Page size in tokens.
            kv_grid: Grid of an attention-only cache, which resumes at every common multiple of it
                and ``page_size``. None for a hybrid cache, which resumes at checkpoints.
        """
        self._kv_step = None if kv_grid is None else lcm(kv_grid, page_size)
        self._tree = RadixTree(page_size)
        self.nodes: dict[int, RadixNode] = {}
        """Nodes by edge id, which is also their serial. They have no rows."""
        self.next_sequence = 0
        """Number of the next batch."""
        self.epoch = 0
        """Epoch of batch 0."""
        self.num_tokens = 0
        """Number of tokens with KV."""
        self.num_checkpoints = 0

    def apply_batch(self, sequence: int, events: Iterable[Event], epoch: int = 0) -> None:
        """Apply one numbered batch. Raises EventsLost unless it is the next one of the epoch of
        batch 0: a sender that starts again has another epoch. O(tokens)."""
        is_first = sequence == self.next_sequence == 0
        if not is_first and (sequence, epoch) != (self.next_sequence, self.epoch):
            raise EventsLost(
                f"batch {sequence} of epoch {epoch} arrived, but {self.next_sequence} of "
                f"{self.epoch} was expected: follow a new subscription with an empty mirror."
            )
        self.epoch = epoch
        for event in events:
            self.apply(event)
        self.next_sequence = sequence + 1

    def apply(self, event: Event) -> None:
        """Apply one event, which follows the preceding ones. O(tokens of the edge)."""
        tree, nodes = self._tree, self.nodes
        match event:
            case KVStored(id_, above, namespace, _, tokens):
                parent = tree.root(namespace) if above is None else nodes[above]
                self._add(id_, tree.grow(parent, np.array(tokens, np.int32).tobytes()))
                self.num_tokens += len(tokens)
            case KVSplit(id_, upper_id, position):
                self._add(upper_id, tree.split(nodes[id_], position))
            case KVRemoved(id_):
                node = nodes.pop(id_)
                self.num_tokens -= node.end - node.start
                tree.fade(node)
                tree.forget(node)
            case CheckpointStored(id_):
                nodes[id_].checkpoint = Checkpoint(nodes[id_], 0, 0, 0, _NO_BYTES)
                self.num_checkpoints += 1
            case CheckpointRemoved(id_):
                nodes[id_].checkpoint = None
                self.num_checkpoints -= 1

    def _add(self, id_: int, node: RadixNode) -> None:
        node.kv = Edge(node, EMPTY, 0, id_, _NO_BYTES)
        self.nodes[id_] = node

    def match(self, tokens: Tokens, namespace: Hashable = None) -> MirrorMatch:
        """Match ``tokens``, int32[n]. O(n)."""
        require_int32(tokens, "tokens")
        above, _, end = self._tree.walk(self._tree.root(namespace), tokens.tobytes(), 0)
        if self._kv_step is not None:
            reachable = max(min(end, len(tokens) - 1), 0)
            return MirrorMatch(reachable - reachable % self._kv_step, end)
        while above.parent is not None and (above.checkpoint is None or above.end >= len(tokens)):
            above = above.parent
        return MirrorMatch(above.end, end)
