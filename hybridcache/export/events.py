"""KV events: the changes of a cache as records, for routers.

``EventStream`` turns changes into small records: segment id, parent id, positions and tokens.
``Mirror`` follows a stream and computes match lengths for a router without contacting the replica.
``hybridcache.routing.outbox`` numbers batches of events for a subscriber that can lose some.

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
from dataclasses import dataclass, field
from math import lcm
from typing import NamedTuple

from hybridcache.api import Listener
from hybridcache.radix.tree import RadixNode
from hybridcache.tokens import Tokens, common_tuple_len, require_int32, require_namespace


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

    O(tokens + nodes above) for stored KV, O(1) otherwise. ``sink`` runs in the middle of a cache
    operation: if it raises, the stream is unsubscribed. Let a sink that can fail, such as a socket,
    read an ``Outbox``.
    """

    def __init__(self, sink: Callable[[Event], None]) -> None:
        self._sink = sink

    def kv_stored(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        above = None if parent.kv is None else parent.kv.serial
        tokens = tuple(node.tokens.tolist())
        self._sink(KVStored(node.serial, above, node.namespace, node.start, tokens))

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        self._sink(KVSplit(lower.serial, upper.serial, upper.end))

    def kv_removed(self, node: RadixNode) -> None:
        self._sink(KVRemoved(node.serial))

    def checkpoint_stored(self, node: RadixNode) -> None:
        assert node.checkpoint is not None
        self._sink(CheckpointStored(node.serial, node.end, node.checkpoint.label))

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._sink(CheckpointRemoved(node.serial, node.end))


# --- Mirror of a cache ----------------------------------------------------------------------------


class EventsLost(ValueError):
    """Raised if a batch of events is not the next one."""


class MirrorMatch(NamedTuple):
    """Match lengths of a prompt in the mirrored cache."""

    cached_len: int
    kv_match_len: int


@dataclass(eq=False, slots=True)
class _Piece:
    """One mirrored segment, or the root of a namespace, without an id."""

    id: int | None
    parent: _Piece | None
    namespace: Hashable
    start: int = 0
    tokens: tuple[int, ...] = ()
    checkpoint: bool = False
    children: dict[tuple[int, ...], _Piece] = field(default_factory=dict)
    """Children by their first page."""


class Mirror:
    """Structure of one cache, built from its events.

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
        self.page_size = page_size
        self._kv_step = None if kv_grid is None else lcm(kv_grid, page_size)
        self._pieces: dict[int, _Piece] = {}
        self._roots: dict[Hashable, _Piece] = {}
        self.next_sequence = 0
        """Number of the next batch."""
        self.num_tokens = 0
        """Number of tokens with KV."""
        self.num_checkpoints = 0

    def apply_batch(self, sequence: int, events: Iterable[Event]) -> None:
        """Apply one numbered batch. Raises EventsLost unless it is the next one. O(tokens)."""
        if sequence != self.next_sequence:
            raise EventsLost(
                f"batch {sequence} of events arrived, but {self.next_sequence} was expected: "
                "follow a new subscription with an empty mirror."
            )
        for event in events:
            self.apply(event)
        self.next_sequence = sequence + 1

    def apply(self, event: Event) -> None:
        """Apply one event, which follows the preceding ones. O(tokens of the segment)."""
        page, pieces = self.page_size, self._pieces
        match event:
            case KVStored(id_, above, namespace, start, tokens):
                root = self._roots.setdefault(namespace, _Piece(None, None, namespace))
                parent = root if above is None else pieces[above]
                piece = pieces[id_] = _Piece(id_, parent, namespace, start, tokens)
                parent.children[tokens[:page]] = piece
                self.num_tokens += len(tokens)
            case KVSplit(id_, upper_id, position):
                lower = pieces[id_]
                cut = position - lower.start
                head, tail = lower.tokens[:cut], lower.tokens[cut:]
                upper = _Piece(upper_id, lower.parent, lower.namespace, lower.start, head)
                assert lower.parent is not None
                lower.parent.children[head[:page]] = pieces[upper_id] = upper
                upper.children[tail[:page]] = lower
                lower.parent, lower.start, lower.tokens = upper, position, tail
            case KVRemoved(id_):
                piece = pieces.pop(id_)
                assert piece.parent is not None
                self.num_tokens -= len(piece.tokens)
                del piece.parent.children[piece.tokens[:page]]
                if not self._roots[piece.namespace].children:
                    del self._roots[piece.namespace]
            case CheckpointStored(id_) | CheckpointRemoved(id_):
                is_stored = isinstance(event, CheckpointStored)
                pieces[id_].checkpoint = is_stored
                self.num_checkpoints += 1 if is_stored else -1

    def match(self, tokens: Tokens | tuple[int, ...], namespace: Hashable = None) -> MirrorMatch:
        """Match ``tokens``, int32[n] in O(n), or a tuple of integers in O(matched tokens)."""
        if isinstance(tokens, tuple):
            ids = tokens
        else:
            require_int32(tokens, "tokens")
            ids = tuple(tokens.tolist())
        require_namespace(namespace)
        piece = self._roots.get(namespace)
        end = cached_len = 0
        while piece and (piece := piece.children.get(ids[end : end + self.page_size])):
            theirs = ids[end : end + len(piece.tokens)]
            if theirs != piece.tokens:
                shared = common_tuple_len(theirs, piece.tokens)
                end += shared - shared % self.page_size
                break
            end += len(piece.tokens)
            if piece.checkpoint and end < len(ids):
                cached_len = end
        if self._kv_step is not None:
            reachable = max(min(end, len(ids) - 1), 0)
            cached_len = reachable - reachable % self._kv_step
        return MirrorMatch(cached_len, end)

    def segments(self) -> set[tuple[int, int | None, Hashable, int, tuple[int, ...], bool]]:
        """Return (id, parent, namespace, start, tokens, checkpoint?) of all segments."""
        return {
            (id_, p.parent.id, p.namespace, p.start, p.tokens, p.checkpoint)
            for id_, p in self._pieces.items()
            if p.parent is not None
        }
