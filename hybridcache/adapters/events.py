"""KV events: the changes of a cache as records, for routers.

``EventStream`` turns changes into small records: edge id, parent id, positions and tokens.
``Mirror`` follows a stream and computes match lengths for a router without contacting the replica.
``hybridcache.adapters.routing.outbox`` numbers batches of events for a subscriber that can lose
some.

>>> import numpy as np
>>> from hybridcache import CacheConfig, build_prefix_cache
>>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=1))
>>> mirror = Mirror(unit=1)
>>> cache.subscribe(EventStream(mirror.apply))
>>> prompt = np.arange(10, dtype=np.int32)
>>> result = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
>>> mirror.match(prompt)
MirrorMatch(cached_len=8, kv_match_len=10)
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from sys import byteorder
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from hybridcache.radix.api import Listener
from hybridcache.radix.tokens import Tokens, common_prefix_len, require_int32, require_namespace
from hybridcache.radix.tree import TOKEN_BYTES, RadixNode

HASH_BYTES = 8
Units = npt.NDArray[np.int64]
"""Hashes or numbers of units, int64[n]."""


class KVStored(NamedTuple):
    """KV of a new edge."""

    id: int
    """Edge id. Never reused."""
    parent: int | None
    """Id of the parent edge, or None for the root of the namespace."""
    namespace: Hashable
    start: int
    """Position of the first id of ``tokens``: the start of the unit in which the parent ends."""
    tokens: bytes
    """Int32 ids up to the end of the edge."""


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

    def __init__(self, sink: Callable[[Event], None], unit: int = 1) -> None:
        """Pass changes to ``sink``, for a mirror with the same ``unit`` in tokens."""
        self._sink, self._unit = sink, unit
        self._ends: dict[int, int] = {}
        """Position at the end of each resident node, by id."""
        self._checkpoints: dict[int, int] = {}

    def kv_stored(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        self._ends[node.serial] = node.end
        above = None if parent.kv is None else parent.kv.serial
        start, tokens = parent.end, node.edge
        first = start - start % self._unit
        while start > first:
            tokens, parent = parent.edge + tokens, parent.parent
            assert parent is not None
            start = parent.end
        tokens = tokens[(first - start) * TOKEN_BYTES :]
        self._sink(KVStored(node.serial, above, node.namespace, first, tokens))

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        self._ends[upper.serial] = upper.end
        self._sink(KVSplit(lower.serial, upper.serial, upper.end))

    def kv_removed(self, node: RadixNode) -> None:
        del self._ends[node.serial]
        self._sink(KVRemoved(node.serial))

    def checkpoint_stored(self, node: RadixNode) -> None:
        self._checkpoints[node.serial] = node.end
        self._sink(CheckpointStored(node.serial, node.end))

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
    """Match lengths of a prompt in the mirrored cache, in whole units."""

    cached_len: int
    kv_match_len: int


def unit_hashes(ids: bytes, unit: int, above: int) -> bytes:
    """Return the int64 hash of each prefix of ``ids``, int32, that ends with a unit. ``above`` is
    the hash of the tokens before. O(tokens). They differ between processes."""
    size, found = unit * TOKEN_BYTES, array("q")
    for at in range(size, len(ids) + 1, size):
        above = hash((above, ids[at - size : at]))
        found.append(above)
    return found.tobytes()


def root_hash(namespace: Hashable) -> int:
    """Return the hash of no tokens. Raises ValueError if the namespace is invalid."""
    require_namespace(namespace)
    return hash(repr(namespace))


def numbers_of(bits: int) -> list[int] | Units:
    """Return the numbers of the ones of ``bits``, which is not 0. O(bits)."""
    if not bits & (bits - 1):
        return [bits.bit_length() - 1]
    parts = np.frombuffer(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(parts, bitorder="little"))


@final
class HeldUnits:
    """Node of ``UnitTree``: hashes of consecutive units, and the caches that hold all of them."""

    __slots__ = ("above", "children", "end", "held", "saved", "units")

    def __init__(self, above: HeldUnits | None, units: bytes, held: int) -> None:
        self.above, self.units, self.held = above, units, held
        self.end: int = len(units) // HASH_BYTES + (0 if above is None else above.end)
        """Number of units from the root."""
        self.saved = 0
        """Caches with a checkpoint at the end: bits, as ``held``."""
        self.children: dict[bytes, HeldUnits] | None = None
        if above is not None:
            above.add(self)

    def add(self, child: HeldUnits) -> None:
        """Add a child, or replace the one that begins with the same unit."""
        self.children = self.children or {}
        self.children[child.units[:HASH_BYTES]] = child


class UnitTree:
    """Prefixes that several caches hold, as one radix tree over the hashes of their units.

    A hash covers all tokens before it. Caches are numbered, and a node has the bits of its holders.
    Memory is 8 bytes per unit, however many caches hold it, and about 100 per node.
    """

    def __init__(self) -> None:
        self.root = HeldUnits(None, b"", 0)

    def path(self, hashes: bytes, node: HeldUnits | None = None) -> Iterator[tuple[HeldUnits, int]]:
        """Yield the nodes on the path of ``hashes`` below ``node``, with the number of units from
        the root that match: perhaps not all of the last one. O(nodes)."""
        at, node = 0, node or self.root
        while (child := (node.children or {}).get(hashes[at : at + HASH_BYTES])) is not None:
            if not hashes.startswith(child.units, at):
                own, other = (np.frombuffer(one, np.int32) for one in (child.units, hashes[at:]))
                yield child, node.end + common_prefix_len(own, other, 2) // 2
                return
            node = child
            yield node, node.end
            at += len(node.units)

    def match(self, hashes: bytes, most: int, count: int) -> Units:
        """Return the units up to the deepest checkpoint, at most ``most``, and those of matching KV
        for each of the first ``count`` caches: int64[2, count]. O(nodes)."""
        found, seen = np.zeros((2, count), np.int64), [-1 << count] * 2
        for node, end in reversed(list(self.path(hashes))):
            saved = node.saved if end == node.end <= most else 0
            for row, bits in enumerate((saved, node.held)):
                if new := bits & ~seen[row]:
                    found[row, numbers_of(new)] = end
                    seen[row] |= new
        return found

    def hold(self, above: HeldUnits, hashes: bytes, bit: int) -> HeldUnits:
        """Note that a cache holds the units of ``hashes`` below ``above``. Returns the node at
        their end. O(nodes)."""
        start = above.end
        for node, end in self.path(hashes, above):
            above = self.at(node, end)
            above.held |= bit
        rest = hashes[(above.end - start) * HASH_BYTES :]
        return HeldUnits(above, rest, bit) if rest else above

    def at(self, node: HeldUnits, end: int) -> HeldUnits:
        """Return the node on the path to ``node`` with ``end``, after a split if there is none.
        O(nodes between)."""
        while node.above is not None and node.above.end >= end:
            node = node.above
        if node.end == end:
            return node
        above = node.above
        assert above is not None
        size = (end - above.end) * HASH_BYTES
        upper = HeldUnits(above, node.units[:size], node.held)
        node.above, node.units = upper, node.units[size:]
        upper.add(node)
        return upper

    def drop(self, node: HeldUnits, start: int, bit: int) -> None:
        """Note that a cache no longer holds the units from ``start`` to ``node``. O(nodes)."""
        while node.end > start:
            above = node.above
            assert above is not None and above.children is not None
            node.held &= ~bit
            if not node.held:
                del above.children[node.units[:HASH_BYTES]]
            node = above


class Mirror:
    """Prefixes of one cache, from its events: hashes of units in a tree that mirrors share.

    After ``EventsLost``, or if its ``EventStream`` is no longer subscribed (``followed`` is None),
    the mirror is stale: a new one must follow a new subscription.
    """

    def __init__(
        self, unit: int, stateful: bool = True, tree: UnitTree | None = None, number: int = 0
    ) -> None:
        """Create an empty mirror.

        Args:
            unit: Least common multiple of the cache's grid and page size, in tokens. Checkpoints
                elsewhere are ignored.
            stateful: False for an attention-only cache, which resumes at every unit.
            tree: Tree of all mirrors, or None for an own one.
            number: Number of the cache, unique in ``tree``.
        """
        self._unit, self._stateful = unit, stateful
        self._tree, self._bit = tree or UnitTree(), 1 << number
        self._edges: dict[int, tuple[HeldUnits, int, int]] = {}
        """Node at the last unit, start and end of each edge, by its id."""
        self.next_sequence = 0
        """Number of the next batch."""
        self.epoch = 0
        """Epoch of batch 0."""
        self.num_tokens = 0
        """Number of tokens with KV."""
        self.num_evicted = 0
        """Number of tokens whose KV was removed."""
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
        edges, unit = self._edges, self._unit
        match event:
            case KVStored(id_, parent, namespace, first, tokens):
                above, _, start = (self._tree.root, 0, 0) if parent is None else edges[parent]
                if above.end * unit != first:
                    raise ValueError(
                        f"events begin at token {first}, and not at a unit of {unit}: give the "
                        "EventStream the unit of the mirror."
                    )
                last = above.units[-HASH_BYTES:]
                top = int.from_bytes(last, byteorder, signed=True) if last else root_hash(namespace)
                hashes, end = unit_hashes(tokens, unit, top), first + len(tokens) // TOKEN_BYTES
                edges[id_] = self._tree.hold(above, hashes, self._bit), start, end
                self.num_tokens += end - start
            case KVSplit(id_, upper_id, position):
                node, start, end = edges[id_]
                edges[upper_id] = self._tree.at(node, position // unit), start, position
                edges[id_] = node, position, end
            case KVRemoved(id_):
                node, start, end = edges.pop(id_)
                self._tree.drop(node, start // unit, self._bit)
                self.num_tokens -= end - start
                self.num_evicted += end - start
            case CheckpointStored(id_, position):
                edges[id_][0].saved |= 0 if position % unit else self._bit
                self.num_checkpoints += 1
            case CheckpointRemoved(id_, position):
                edges[id_][0].saved &= ~(0 if position % unit else self._bit)
                self.num_checkpoints -= 1

    def clear(self) -> None:
        """Forget everything. O(nodes)."""
        for node, start, _ in self._edges.values():
            node.saved &= ~self._bit
            self._tree.drop(node, start // self._unit, self._bit)
        self._edges.clear()
        self.num_tokens = self.num_checkpoints = self.next_sequence = 0

    def match(self, tokens: Tokens, namespace: Hashable = None) -> MirrorMatch:
        """Match ``tokens``, int32[n]. O(n)."""
        require_int32(tokens, "tokens")
        hashes = unit_hashes(tokens.tobytes(), self._unit, root_hash(namespace))
        most, number = max(len(tokens) - 1, 0) // self._unit, self._bit.bit_length()
        cached, held = self._tree.match(hashes, most, number)[:, -1].tolist()
        return MirrorMatch(
            (cached if self._stateful else min(held, most)) * self._unit, held * self._unit
        )

    def check(self) -> None:
        """Raise AssertionError unless the tree has the bits of exactly the mirrored edges.
        O(nodes)."""
        held = {id(self._tree.root)}
        for node, start, _ in self._edges.values():
            while node.end > start // self._unit:
                assert node.held & self._bit and node.above is not None
                held.add(id(node))
                node = node.above
        waiting = [self._tree.root]
        for node in waiting:
            assert id(node) in held or not (node.held | node.saved) & self._bit
            assert node.held or node is self._tree.root
            waiting += (node.children or {}).values()
        assert self.num_tokens == sum(end - start for _, start, end in self._edges.values())
