"""KV events: what a cache stored and removed, for routers of replicas; and the mirror that a subscriber keeps.

``EventStream`` turns a cache's changes into small records with numbers for names: a segment's id, its parent's id, positions,
tokens. ``encode`` and ``decode`` write batches as JSON or msgpack. ``Mirror`` follows a stream and answers what a router
asks, "how much of this prompt does that replica have", without ever talking to it.

>>> import numpy as np
>>> from hybridcache import CacheConfig, build_prefix_cache
>>> cache, mirror = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=1)), Mirror(page_size=1)
>>> cache.subscribe(EventStream(mirror.apply))
>>> prompt = np.arange(10, dtype=np.int32)
>>> result = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
>>> mirror.match(prompt)
MirrorMatch(cached_len=8, kv_len=10)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, cast

from hybridcache.listener import Listener
from hybridcache.policies.protocol import Item
from hybridcache.radix.node import RadixNode

Namespace = str | int | None
"""How a namespace is written in events: as it is, or as its ``repr`` where it is neither text nor a number."""


class KVStored(NamedTuple):
    """A segment's KV became resident."""

    id: int
    """Never used again after its removal."""
    parent: int | None
    """Id of the segment above; None: the namespace's root."""
    namespace: Namespace
    start: int
    tokens: tuple[int, ...]


class KVSplit(NamedTuple):
    """Segment ``id`` keeps what is past ``position``; the rest above it is now ``upper``."""

    id: int
    upper: int
    position: int


class KVRemoved(NamedTuple):
    """Segment ``id``, which had no children left, lost its KV."""

    id: int


class CheckpointStored(NamedTuple):
    """The state at the end of segment ``id`` was saved."""

    id: int
    position: int
    label: str


class CheckpointRemoved(NamedTuple):
    """The state at the end of segment ``id`` went; its KV may stay."""

    id: int
    position: int


Event = KVStored | KVSplit | KVRemoved | CheckpointStored | CheckpointRemoved
EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (KVStored, KVSplit, KVRemoved, CheckpointStored, CheckpointRemoved)
}
"""By the name that stands first in the written form."""


class EventStream(Listener):
    """A cache listener that hands each change to ``sink`` as an ``Event``. O(tokens) for what is stored, else O(1)."""

    def __init__(self, sink: Callable[[Event], None]) -> None:
        self._sink = sink

    def kv_stored(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        root = parent
        while root.parent is not None:
            root = root.parent
        above = None if parent.kv is None else parent.kv.serial
        namespace = write_namespace(root.key)
        self._sink(KVStored(_id(node), above, namespace, node.start, tuple(node.tokens.tolist())))

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        self._sink(KVSplit(_id(lower), _id(upper), upper.end))

    def kv_removed(self, node: RadixNode) -> None:
        self._sink(KVRemoved(_id(node)))

    def checkpoint_stored(self, node: RadixNode) -> None:
        assert node.checkpoint is not None
        self._sink(CheckpointStored(_id(node), node.end, node.checkpoint.label))

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._sink(CheckpointRemoved(_id(node), node.end))

    def chosen(self, item: Item) -> None:
        """What goes is told when it goes."""


def _id(node: RadixNode) -> int:
    assert node.kv is not None
    return node.kv.serial


def write_namespace(namespace: Hashable) -> Namespace:
    """A namespace as events write it: None, texts and whole numbers as they are, others by their ``repr``."""
    if namespace is None or isinstance(namespace, str | int):
        return namespace
    return repr(namespace)


def encode(sequence: int, events: Iterable[Event], form: str = "json") -> bytes:
    """A batch as bytes: ``[sequence, [[name, field, ...], ...]]``. ``form``: json or msgpack (needs that package)."""
    batch = [sequence, [[type(event).__name__, *event] for event in events]]
    if form == "json":
        return json.dumps(batch, separators=(",", ":")).encode()
    if form == "msgpack":
        import msgpack

        return cast(bytes, msgpack.packb(batch))
    raise ValueError(f"events are written as json or msgpack, not {form!r}")


def decode(batch: bytes, form: str = "json") -> tuple[int, list[Event]]:
    """(sequence, events) of what ``encode`` wrote."""
    if form == "json":
        sequence, records = json.loads(batch)
    elif form == "msgpack":
        import msgpack

        sequence, records = msgpack.unpackb(batch)
    else:
        raise ValueError(f"events are written as json or msgpack, not {form!r}")
    return sequence, [_read(record) for record in records]


def _read(record: Sequence[Any]) -> Event:
    name, *fields = record
    if name == "KVStored":
        fields[-1] = tuple(fields[-1])
    return EVENTS[name](*fields)


class MirrorMatch(NamedTuple):
    """What the mirrored cache would answer for a prompt."""

    cached_len: int
    kv_len: int


class _Piece:
    """One mirrored segment."""

    __slots__ = ("checkpoint", "children", "key", "namespace", "parent", "start", "tokens")

    def __init__(self, stored: KVStored, key: tuple[int, ...]) -> None:
        self.namespace, self.parent = stored.namespace, stored.parent
        self.start, self.tokens = stored.start, stored.tokens
        self.key = key
        self.checkpoint = False
        self.children: dict[tuple[int, ...], int] = {}


class Mirror:
    """What one cache holds, known from its events alone."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._pieces: dict[int, _Piece] = {}
        self._roots: dict[Namespace, dict[tuple[int, ...], int]] = {}

    def apply(self, event: Event) -> None:
        """Follow one event. O(tokens of the segment). KeyError: an event was lost before this one."""
        match event:
            case KVStored():
                piece = _Piece(event, event.tokens[: self.page_size])
                self._pieces[event.id] = piece
                self._siblings(piece)[piece.key] = event.id
            case KVSplit():
                self._split(event)
            case KVRemoved():
                piece = self._pieces.pop(event.id)
                del self._siblings(piece)[piece.key]
                if piece.parent is None and not self._roots[piece.namespace]:
                    del self._roots[piece.namespace]
            case CheckpointStored() | CheckpointRemoved():
                self._pieces[event.id].checkpoint = isinstance(event, CheckpointStored)

    def _siblings(self, piece: _Piece) -> dict[tuple[int, ...], int]:
        if piece.parent is None:
            return self._roots.setdefault(piece.namespace, {})
        return self._pieces[piece.parent].children

    def _split(self, event: KVSplit) -> None:
        lower = self._pieces[event.id]
        cut = event.position - lower.start
        head, tail = lower.tokens[:cut], lower.tokens[cut:]
        stored = KVStored(event.upper, lower.parent, lower.namespace, lower.start, head)
        upper = self._pieces[event.upper] = _Piece(stored, lower.key)
        self._siblings(upper)[upper.key] = event.upper
        lower.parent, lower.start, lower.tokens = event.upper, event.position, tail
        lower.key = tail[: self.page_size]
        upper.children[lower.key] = event.id

    def match(self, tokens: Sequence[int], namespace: Hashable = None) -> MirrorMatch:
        """How much of ``tokens`` the cache has. O(len(tokens))."""
        ids = tuple(int(token) for token in tokens)
        children = self._roots.get(write_namespace(namespace), {})
        end = cached_len = 0
        while (found := children.get(ids[end : end + self.page_size])) is not None:
            piece = self._pieces[found]
            theirs = ids[end : end + len(piece.tokens)]
            if theirs != piece.tokens:
                pairs = zip(theirs, piece.tokens, strict=False)
                shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(theirs))
                end += shared - shared % self.page_size
                break
            end += len(piece.tokens)
            if piece.checkpoint and end < len(ids):
                cached_len = end
            children = piece.children
        return MirrorMatch(cached_len, end)

    def segments(self) -> set[tuple[int, int | None, Namespace, int, tuple[int, ...], bool]]:
        """(id, parent, namespace, start, tokens, checkpoint?) of all it knows: what ``segments_of`` says of a cache."""
        return {
            (id_, p.parent, p.namespace, p.start, p.tokens, p.checkpoint)
            for id_, p in self._pieces.items()
        }


def segments_of(
    nodes: Iterable[RadixNode],
) -> set[tuple[int, int | None, Namespace, int, tuple[int, ...], bool]]:
    """What a mirror must know of resident ``nodes``, read from the tree itself. O(tokens)."""
    found: list[Event] = []
    stream = EventStream(found.append)
    segments = set()
    for node in nodes:
        if node.kv is not None:
            stream.kv_stored(node)
            stored = found.pop()
            assert isinstance(stored, KVStored)
            segments.add((*stored, node.checkpoint is not None))
    return segments
