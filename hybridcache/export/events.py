"""KV events: what a cache stored and removed, for routers of replicas; and the mirror that a
subscriber keeps.

``EventStream`` turns a cache's changes into small records with numbers for names: a segment's id,
its parent's id, positions, tokens. ``Batches`` numbers them and writes them as JSON or msgpack,
``decode`` reads that. ``Mirror`` follows a stream and answers what a router asks, "how much of this
prompt does that replica have", without ever talking to it.

>>> import numpy as np
>>> from hybridcache import CacheConfig, build_prefix_cache
>>> from hybridcache.export.mirror import Mirror
>>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=1))
>>> mirror = Mirror(page_size=1)
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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

from hybridcache.api import Listener
from hybridcache.export.namespaces import Namespace, read_namespace, write_namespace
from hybridcache.policies.protocol import Item
from hybridcache.radix.tree import RadixNode


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
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (int,),
    "upper": (int,),
    "parent": (int, type(None)),
    "position": (int,),
    "start": (int,),
    "namespace": (str, int, tuple, type(None)),
    "tokens": (tuple,),
    "label": (str,),
}
"""What each field of an event may be."""


class EventStream(Listener):
    """A cache listener that hands each change to ``sink`` as an ``Event``. O(tokens) for what is
    stored, else O(1).

    ``sink`` runs in the middle of the cache's change: where it raises, the stream is unsubscribed
    and notified no more, so one that may fail, as a socket does, stands behind ``Batches``. One
    stream follows one cache.
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
        """What goes is reported when it goes."""


def _id(node: RadixNode) -> int:
    assert node.kv is not None
    return node.kv.serial


def encode(sequence: int, events: Iterable[Event], form: str = "json") -> bytes:
    """A batch as bytes: ``[sequence, [[name, field, ...], ...]]``. ``form``: json or msgpack (needs
    that package).

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
    """(sequence, events) of what ``encode`` wrote. ValueError: it is nothing that ``encode``
    wrote."""
    if form not in FORMS:
        raise ValueError(f"events are written as json or msgpack, not {form!r}")
    try:
        if form == "json":
            sequence, records = json.loads(batch)
        else:
            import msgpack

            sequence, records = msgpack.unpackb(batch)
        if type(sequence) is not int:
            raise TypeError("its number is no whole number")
        return sequence, [_read(record) for record in records]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(f"this is no batch of events in {form}: {error}") from error


def _read(record: Sequence[Any]) -> Event:
    name, *fields = record
    if name == "KVStored":
        fields[2], fields[4] = read_namespace(fields[2]), tuple(fields[4])
        if not set(map(type, fields[4])) <= {int}:
            raise TypeError("a token is no whole number")
    event = EVENTS[name](*fields)
    for field, value in event._asdict().items():
        if type(value) not in _TYPES[field]:
            raise TypeError(f"{field} of {name} is {value!r:.40}")
    return event


class Batches:
    """A sink for ``EventStream`` that gathers events until ``take`` writes them as the next batch:
    number 0, 1, 2 and so on.

    Sending is the caller's, between the cache's verbs: a wire that fails harms no cache.
    """

    def __init__(self, form: str = "json") -> None:
        """ValueError: a ``form`` that is neither json nor msgpack."""
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
