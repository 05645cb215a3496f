"""KV events: the changes of a cache as records, for routers and other subscribers.

``EventStream`` turns changes into small records: segment id, parent id, positions and tokens.
``Batches`` numbers and encodes them as JSON or msgpack, and ``decode`` reads them. ``Mirror``
follows a stream and computes match lengths for a router without contacting the replica.

>>> import numpy as np
>>> from hybridcache import CacheConfig, build_prefix_cache
>>> from hybridcache.export.mirror import Mirror
>>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=100, num_slots=2, grid=1))

A mirror follows every change of the cache:

>>> mirror = Mirror(page_size=1)
>>> cache.subscribe(EventStream(mirror.apply))
>>> prompt = np.arange(10, dtype=np.int32)
>>> result = cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
>>> mirror.match(prompt)
MirrorMatch(cached_len=8, kv_match_len=10)

Over a wire that can lose batches:

>>> batches, remote = Batches(), Mirror(page_size=1)
>>> cache.subscribe(EventStream(batches))
>>> remote.apply_batch(*decode(batches.take()))
>>> remote.match(prompt)
MirrorMatch(cached_len=8, kv_match_len=10)
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
    """KV of a new segment."""

    id: int
    """Segment id. Never reused."""
    parent: int | None
    """Id of the parent segment, or None for the root of the namespace."""
    namespace: Namespace
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
EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (KVStored, KVSplit, KVRemoved, CheckpointStored, CheckpointRemoved)
}
"""Event types by name, the first field of the encoded form."""

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
"""Valid types of each field."""


class EventStream(Listener):
    """Cache listener that passes each change to ``sink`` as an ``Event``.

    O(tokens) for stored KV, O(1) otherwise. ``sink`` runs in the middle of a cache operation: if it
    raises, the stream is unsubscribed. Put a sink that can fail, such as a socket, behind
    ``Batches``. Each stream follows one cache.
    """

    def __init__(self, sink: Callable[[Event], None]) -> None:
        self._sink = sink
        self._namespaces: dict[int, Namespace] = {}
        """Encoded namespace by segment, so that children need no walk to the root."""

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
        """Ignored: the removal is reported when it happens."""


def _id(node: RadixNode) -> int:
    assert node.kv is not None
    return node.kv.serial


def encode(sequence: int, events: Iterable[Event], form: str = "json") -> bytes:
    """Encode a batch as ``[sequence, [[name, field, ...], ...]]``.

    Args:
        sequence: Number of the batch.
        events: Its events.
        form: ``json`` or ``msgpack`` (requires that package). Both encode the same values.

    Raises:
        ValueError: a string or a number cannot be encoded in both forms.
    """
    if form not in FORMS:
        raise ValueError(f"form must be json or msgpack (got {form!r}).")
    records = [[type(event).__name__, *event] for event in events]
    batch = [sequence, records]
    try:
        for number in (sequence, *(field for record in records for field in record)):
            if isinstance(number, int) and number >= 1 << 64:
                raise OverflowError(f"{number} exceeds 64 bits")
        if form == "json":
            return json.dumps(batch, separators=(",", ":"), ensure_ascii=False).encode()
        return cast(bytes, _msgpack().packb(batch))
    except (UnicodeEncodeError, OverflowError) as error:
        raise ValueError(f"A batch of events cannot be encoded: {error}.") from error


def _msgpack() -> Any:
    try:
        import msgpack
    except ModuleNotFoundError as error:
        hint = "msgpack is not installed: pip install 'hybrid-radix-cache[serve-extras]'"
        raise ModuleNotFoundError(hint, name=error.name) from None
    return msgpack


def decode(batch: bytes, form: str = "json") -> tuple[int, list[Event]]:
    """Decode the result of ``encode`` into (sequence, events). Raises ValueError for other data."""
    if form not in FORMS:
        raise ValueError(f"form must be json or msgpack (got {form!r}).")
    try:
        if form == "json":
            sequence, records = json.loads(batch)
        else:
            sequence, records = _msgpack().unpackb(batch)
        if type(sequence) is not int:
            raise TypeError("its number is not an integer")
        return sequence, [_read(record) for record in records]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError(f"This is not a batch of events in {form}: {error}.") from error


def _read(record: Sequence[Any]) -> Event:
    name, *fields = record
    if name == "KVStored":
        fields[2], fields[4] = read_namespace(fields[2]), tuple(fields[4])
        if not set(map(type, fields[4])) <= {int}:
            raise TypeError("a token is not an integer")
    event = EVENTS[name](*fields)
    for field, value in event._asdict().items():
        if type(value) not in _TYPES[field]:
            raise TypeError(f"{field} of {name} is {value!r:.40}")
    return event


class Batches:
    """Sink for ``EventStream`` that collects events until ``take`` encodes them as a batch.

    Batches are numbered 0, 1, 2 and so on. The caller sends them between cache operations, so a
    failing connection cannot harm the cache.
    """

    def __init__(self, form: str = "json") -> None:
        """Create an empty collector. Raises ValueError if ``form`` is not json or msgpack."""
        if form not in FORMS:
            raise ValueError(f"form must be json or msgpack (got {form!r}).")
        self._form = form
        self._sequence = 0
        self._events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self._events.append(event)

    def __len__(self) -> int:
        """Return the number of collected events."""
        return len(self._events)

    def take(self) -> bytes:
        """Encode the events since the last call, which can be none. O(tokens)."""
        batch = encode(self._sequence, self._events, self._form)
        self._sequence += 1
        self._events = []
        return batch
