"""Mirror: a copy of one cache's structure, built from its events, for routers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import lcm
from typing import NamedTuple

from hybridcache.export.events import (
    CheckpointRemoved,
    CheckpointStored,
    Event,
    KVRemoved,
    KVSplit,
    KVStored,
)
from hybridcache.tokens import common_tuple_len, require_namespace, require_positive


class EventsLost(ValueError):
    """Raised if an event cannot follow the preceding ones."""


class MirrorMatch(NamedTuple):
    """Match lengths of a prompt in the mirrored cache."""

    cached_len: int
    kv_match_len: int


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
    """Structure of one cache, built from its events.

    Gaps in batch numbers and contradictory events raise ``EventsLost``. The mirror is then stale: a
    new one must follow a new subscription, which begins with the whole cache. An ``EventStream``
    that is no longer subscribed (``followed`` is None) sends nothing: its mirror is stale too.
    """

    def __init__(self, page_size: int, kv_grid: int | None = None) -> None:
        """Create an empty mirror.

        Args:
            page_size: Page size in tokens.
            kv_grid: Grid of an attention-only cache, which resumes at every common multiple of it
                and ``page_size``. None for a hybrid cache, which resumes at checkpoints.

        Raises:
            TypeError, ValueError: a number is not an integer, or less than 1.
        """
        for what, number in (("page_size", page_size), ("kv_grid", kv_grid)):
            require_positive(1 if number is None else number, what)
        self.page_size = page_size
        self._kv_step = None if kv_grid is None else lcm(kv_grid, page_size)
        self._pieces: dict[int, _Piece] = {}
        self._roots: dict[Hashable, dict[tuple[int, ...], int]] = {}
        self.next_sequence = 0
        """Number of the next batch."""
        self.num_tokens = 0
        """Number of tokens with KV."""
        self.num_checkpoints = 0

    def apply_batch(self, sequence: int, events: Iterable[Event]) -> None:
        """Apply one numbered batch. O(tokens).

        Raises EventsLost unless ``sequence`` is the next batch.
        """
        if sequence != self.next_sequence:
            raise EventsLost(
                f"batch {sequence} of events arrived, but {self.next_sequence} was expected: "
                "follow a new subscription with an empty mirror."
            )
        for event in events:
            self.apply(event)
        self.next_sequence = sequence + 1

    def apply(self, event: Event) -> None:
        """Apply one event. O(tokens of the segment).

        Raises EventsLost if it cannot follow the preceding events.
        """
        if not self._follows(event):
            raise EventsLost(
                f"an event was lost before {type(event).__name__} of segment {event.id}: "
                "follow a new subscription with an empty mirror."
            )
        match event:
            case KVStored():
                piece = _Piece(event, event.tokens[: self.page_size])
                self._pieces[event.id] = piece
                self._siblings(piece)[piece.key] = event.id
                self.num_tokens += len(event.tokens)
            case KVSplit():
                self._split(event)
            case KVRemoved():
                piece = self._pieces.pop(event.id)
                self.num_tokens -= len(piece.tokens)
                del self._siblings(piece)[piece.key]
                if piece.parent is None and not self._roots[piece.namespace]:
                    del self._roots[piece.namespace]
            case CheckpointStored() | CheckpointRemoved():
                is_stored = isinstance(event, CheckpointStored)
                self._pieces[event.id].checkpoint = is_stored
                self.num_checkpoints += 1 if is_stored else -1

    def _follows(self, event: Event) -> bool:
        """Return True if ``event`` is consistent with the mirror. O(page)."""
        if isinstance(event, KVStored):
            return event.id not in self._pieces and self._fits(event)
        piece = self._pieces.get(event.id)
        if piece is None:
            return False
        match event:
            case KVSplit():
                is_whole = event.position % self.page_size == 0
                is_inside = piece.start < event.position < piece.end
                return is_whole and is_inside and event.upper not in self._pieces
            case KVRemoved():
                return not piece.children and not piece.checkpoint
            case CheckpointStored():
                return event.position == piece.end and not piece.checkpoint
            case CheckpointRemoved():
                return event.position == piece.end and piece.checkpoint

    def _fits(self, event: KVStored) -> bool:
        """Return True if the parent exists, ends at the start and has no such child."""
        if event.parent is None:
            end, siblings = 0, self._roots.get(event.namespace, {})
        else:
            parent = self._pieces.get(event.parent)
            if parent is None:
                return False
            end, siblings = parent.end, parent.children
        num_tokens = len(event.tokens)
        is_whole = num_tokens > 0 and num_tokens % self.page_size == 0
        is_free = event.tokens[: self.page_size] not in siblings
        return is_whole and event.start == end and is_free

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
        """Match ``tokens``. O(len(tokens)), or O(matched tokens) if it is a tuple."""
        ids = tokens if type(tokens) is tuple else tuple(int(token) for token in tokens)
        require_namespace(namespace)
        children = self._roots.get(namespace, {})
        end = cached_len = 0
        while (found := children.get(ids[end : end + self.page_size])) is not None:
            piece = self._pieces[found]
            theirs = ids[end : end + len(piece.tokens)]
            if theirs != piece.tokens:
                shared = common_tuple_len(theirs, piece.tokens)
                end += shared - shared % self.page_size
                break
            end += len(piece.tokens)
            if piece.checkpoint and end < len(ids):
                cached_len = end
            children = piece.children
        if self._kv_step is not None:
            reachable = max(min(end, len(ids) - 1), 0)
            cached_len = reachable - reachable % self._kv_step
        return MirrorMatch(cached_len, end)

    def segments(self) -> set[tuple[int, int | None, Hashable, int, tuple[int, ...], bool]]:
        """Return (id, parent, namespace, start, tokens, checkpoint?) of all segments."""
        return {
            (id_, p.parent, p.namespace, p.start, p.tokens, p.checkpoint)
            for id_, p in self._pieces.items()
        }
