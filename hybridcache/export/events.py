"""KV events: what a cache stored and removed, for routers of replicas; and the mirror that a subscriber keeps.

``EventStream`` turns a cache's changes into small records with numbers for names: a segment's id, its parent's id, positions,
tokens. ``Batches`` numbers them and writes them as JSON or msgpack, ``decode`` reads that. ``Mirror`` follows a stream and
answers what a router asks, "how much of this prompt does that replica have", without ever talking to it.

>>> import numpy as np
>>> from hybridcache import CacheConfig, build_prefix_cache
>>> cache, mirror = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=1)), Mirror(page_size=1)
>>> cache.subscribe(EventStream(mirror.apply))
>>> prompt = np.arange(10, dtype=np.int32)
>>> result = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
>>> mirror.match(prompt)
MirrorMatch(cached_len=8, kv_len=10)

Over a wire, where batches may be lost:

>>> batches, remote = Batches(), Mirror(page_size=1)
>>> cache.subscribe(EventStream(batches))
>>> remote.apply_batch(*decode(batches.take()))
>>> remote.match(prompt)
MirrorMatch(cached_len=8, kv_len=10)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, cast

from hybridcache.export.namespaces import Namespace, read_namespace, write_namespace
from hybridcache.listener import Listener
from hybridcache.policies.protocol import Item
from hybridcache.radix.node import RadixNode


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

FORMS = ("json", "msgpack")


class EventStream(Listener):
    """A cache listener that hands each change to ``sink`` as an ``Event``. O(tokens) for what is stored, else O(1).

    ``sink`` runs in the middle of the cache's change: where it raises, the stream is unsubscribed and told no more, so one that
    may fail, as a socket does, stands behind ``Batches``. One stream follows one cache.
    """

    def __init__(self, sink: Callable[[Event], None]) -> None:
        self._sink = sink
        self._namespaces: dict[int, Namespace] = {}
        """By segment, so that a new one asks its parent instead of walking to the root."""

    def kv_stored(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        above = None if parent.kv is None else parent.kv.serial
        namespace = write_namespace(parent.key) if above is None else self._namespaces[above]
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

    def chosen(self, item: Item) -> None:
        """What goes is told when it goes."""


def _id(node: RadixNode) -> int:
    assert node.kv is not None
    return node.kv.serial


def encode(sequence: int, events: Iterable[Event], form: str = "json") -> bytes:
    """A batch as bytes: ``[sequence, [[name, field, ...], ...]]``. ``form``: json or msgpack (needs that package).

    Both forms carry the same: ValueError where a text or a number is one that either could not.
    """
    if form not in FORMS:
        raise ValueError(f"events are written as json or msgpack, not {form!r}")
    records = [[type(event).__name__, *event] for event in events]
    batch = [sequence, records]
    try:
        for number in (sequence, *(field for record in records for field in record)):
            if isinstance(number, int) and number >= 1 << 64:
                raise OverflowError(f"{number} is past 64 bits")
        if form == "json":
            return json.dumps(batch, separators=(",", ":"), ensure_ascii=False).encode()
        import msgpack

        return cast(bytes, msgpack.packb(batch))
    except (UnicodeEncodeError, OverflowError) as error:
        raise ValueError(f"a batch of events holds what no wire carries: {error}") from error


def decode(batch: bytes, form: str = "json") -> tuple[int, list[Event]]:
    """(sequence, events) of what ``encode`` wrote. ValueError: it is nothing that ``encode`` wrote."""
    if form not in FORMS:
        raise ValueError(f"events are written as json or msgpack, not {form!r}")
    try:
        if form == "json":
            sequence, records = json.loads(batch)
        else:
            import msgpack

            sequence, records = msgpack.unpackb(batch)
        return sequence, [_read(record) for record in records]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"this is no batch of events in {form}: {error}") from error


def _read(record: Sequence[Any]) -> Event:
    name, *fields = record
    if name == "KVStored":
        fields[2], fields[4] = read_namespace(fields[2]), tuple(fields[4])
    return EVENTS[name](*fields)


class Batches:
    """A sink for ``EventStream`` that gathers events until ``take`` writes them as the next batch: number 0, 1, 2 and so on.

    Sending is the caller's, between the cache's verbs: a wire that fails harms no cache.
    """

    def __init__(self, form: str = "json") -> None:
        if form not in FORMS:
            raise ValueError(f"events are written as json or msgpack, not {form!r}")
        self._form = form
        self._sequence = 0
        self._events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self._events.append(event)

    def __len__(self) -> int:
        """Events that wait."""
        return len(self._events)

    def take(self) -> bytes:
        """What came since the last time, encoded; a batch without events is one too. O(tokens)."""
        batch = encode(self._sequence, self._events, self._form)
        self._sequence += 1
        self._events = []
        return batch


class EventsLost(ValueError):
    """A mirror was given an event that can not follow those it knows."""


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

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Mirror:
    """What one cache holds, known from its events alone.

    A gap in the numbers of batches is refused, and so is an event that contradicts what is known: then the mirror is stale,
    and a new one must follow a new subscription, which begins with all that is cached.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._pieces: dict[int, _Piece] = {}
        self._roots: dict[Namespace, dict[tuple[int, ...], int]] = {}
        self._next_sequence = 0

    def apply_batch(self, sequence: int, events: Iterable[Event]) -> None:
        """Follow what ``decode`` gave. O(tokens). EventsLost: it is not the batch after the last one."""
        if sequence != self._next_sequence:
            raise EventsLost(
                f"batch {sequence} of events came where {self._next_sequence} was due: "
                "follow a new subscription with an empty mirror"
            )
        for event in events:
            self.apply(event)
        self._next_sequence = sequence + 1

    def apply(self, event: Event) -> None:
        """Follow one event. O(tokens of the segment). EventsLost: it can not come after those before it."""
        if not self._follows(event):
            raise EventsLost(
                f"an event was lost before {type(event).__name__} of segment {event.id}: "
                "follow a new subscription with an empty mirror"
            )
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

    def _follows(self, event: Event) -> bool:
        """Whether ``event`` is possible after what is known. O(page)."""
        if isinstance(event, KVStored):
            return event.id not in self._pieces and self._fits(event)
        piece = self._pieces.get(event.id)
        if piece is None:
            return False
        match event:
            case KVSplit():
                return event.upper not in self._pieces and piece.start < event.position < piece.end
            case KVRemoved():
                return not piece.children and not piece.checkpoint
            case CheckpointStored():
                return event.position == piece.end and not piece.checkpoint
            case CheckpointRemoved():
                return event.position == piece.end and piece.checkpoint

    def _fits(self, event: KVStored) -> bool:
        """Whether its place is known and free."""
        if event.parent is None:
            end, siblings = 0, self._roots.get(event.namespace, {})
        else:
            parent = self._pieces.get(event.parent)
            if parent is None:
                return False
            end, siblings = parent.end, parent.children
        return event.start == end and event.tokens[: self.page_size] not in siblings

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
    """What a mirror must know of resident ``nodes``, parents before children, read from the tree itself. O(tokens)."""
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
