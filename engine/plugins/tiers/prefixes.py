"""Index of the records: a tree of runs of tokens with states on them, and the rows of the cache's
disk tier that point into them.

A run has the tokens of one KV record. They follow the tokens of its parent up to ``start``, which
is any position in the parent. Runs are never split: a path that leaves a run in its middle
continues with a run that starts there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from hybridcache.allocators.moves import Indices
from hybridcache.radix.tokens import EMPTY, Tokens, common_prefix_len, read_namespace

STATE = -1
"""Stands for the first token of a state in its key."""


class RecordPart(NamedTuple):
    """Consecutive rows of one record from ``offset`` on; ``id`` is 0 for rows that point nowhere.
    A run has a row per token."""

    id: int
    offset: int
    num_rows: int


class PrefixPart(NamedTuple):
    """One record: a run of tokens with their KV, or the state at the end of a prefix."""

    parent: int
    """Id of the run that a run continues, or 0 if it begins a prompt. For a state, id of the run
    that contains its position, after the first token of that run."""
    start: int
    """Position of the first token."""
    tokens: Tokens
    """Empty for a state."""
    namespace: Hashable

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_state(self) -> bool:
        return not len(self.tokens)

    @property
    def key(self) -> Hashable:
        """Place in the tree: no other item has the same."""
        first = STATE if self.is_state else int(self.tokens[0])
        return self.parent or ("", self.namespace), self.start, first

    def encode(self) -> bytes:
        """Return the meta of its record."""
        tokens, space = self.tokens.astype("<i4").tobytes(), repr(self.namespace)
        return msgspec.msgpack.encode((self.parent, self.start, tokens, space))

    @classmethod
    def decode(cls, meta: bytes) -> PrefixPart:
        """Return the item of a record. Its checksum was compared, so the meta is trusted."""
        parent, start, tokens, space = msgspec.msgpack.decode(meta)
        found = np.frombuffer(tokens, "<i4").astype(np.int32)
        return cls(parent, start, found, read_namespace(space))


class Prefixes:
    """Items by id. An item is in use while it has children, or while a row of the tier points into
    it."""

    def __init__(self, num_rows: int) -> None:
        self.items: dict[int, PrefixPart] = {}
        self.ids: dict[Hashable, int] = {}
        """Ids of all items by ``key``."""
        self._num_uses: dict[int, int] = {}
        """Number of children of each item, and of rows that point into it."""
        self.unused: OrderedDict[int, None] = OrderedDict()
        """Items that are not in use, in the order in which they are removed: the least recently
        used first."""
        self._found: tuple[Hashable, Tokens, list[RecordPart]] = None, EMPTY, []
        """Path and result of the last ``find``, because chunks of a prompt follow each other."""
        self._records = np.zeros(num_rows, np.int64)
        """Record id of each row, or 0 if it points nowhere."""
        self._offsets = np.zeros(num_rows, np.int32)

    def add(self, number: int, item: PrefixPart) -> bool:
        """Add an item as the last used. Returns False without a parent, or if it exists."""
        if item.key in self.ids or (item.parent and item.parent not in self.items):
            return False
        self.items[number], self.ids[item.key] = item, number
        self._num_uses[number] = 0
        self.unused[number] = None
        self._use(item.parent, 1)
        return True

    def remove(self, number: int) -> PrefixPart:
        """Remove an item that is not in use, and return it."""
        item = self.items.pop(number)
        del self.ids[item.key], self._num_uses[number], self.unused[number]
        self._use(item.parent, -1)
        return item

    def lose(self, numbers: Iterable[int]) -> list[int]:
        """Unbind the rows of existing items and of all descendants. Returns their ids, children
        first. O(all items + rows of the tier)."""
        gone = {number for number in numbers if number in self.items}
        for other in sorted(self.items):  # A parent has a smaller id.
            if self.items[other].parent in gone:
                gone.add(other)
        self.unbind(np.flatnonzero(np.isin(self._records, list(gone))).astype(np.int32))
        return sorted(gone, reverse=True)

    def find(self, namespace: Hashable, tokens: Tokens) -> list[RecordPart]:
        """Return the runs of the longest stored prefix of ``tokens``. O(len(tokens)), but only a
        comparison of them up to the end of the last call, if they continue its path."""
        pieces: list[RecordPart] = []
        above: Hashable = ("", namespace)
        at = 0
        space, known, found = self._found
        # A run stays while another continues it, so the last one stands for all.
        last = self.items.get(found[-1].id) if found and space == namespace else None
        if last is not None and np.array_equal(known, tokens[: len(known)]):
            pieces, above, at = found[:-1], last.parent or above, last.start
        while at < len(tokens):
            number = self.ids.get((above, at, int(tokens[at])))
            if number is None:
                break
            num_tokens = common_prefix_len(self.items[number].tokens, tokens[at:])
            pieces.append(RecordPart(number, 0, num_tokens))
            at += num_tokens
            above = number
        self._found = namespace, tokens, pieces
        return pieces.copy()

    def newest_states(self, room: int, state_rows: int) -> list[int]:
        """Return the newest states, newest first: as many as fit into ``room`` rows together with
        their KV. O(states + runs on their paths)."""
        covered: dict[int, int] = {}
        found = []
        for number in sorted(self.items, reverse=True):
            item = self.items[number]
            if not item.is_state:
                continue
            room -= state_rows
            above, end = item.parent, item.end
            while above:
                run, known = self.items[above], covered.get(above, 0)
                if end - run.start <= known:
                    break
                room -= end - run.start - known
                covered[above] = end - run.start
                above, end = run.parent, run.start
            if room < 0:
                break
            found.append(number)
        return found

    def path(self, number: int) -> tuple[Hashable, Tokens]:
        """Return (namespace, all tokens up to the end of the item). O(position)."""
        item = self.items[number]
        parts, end = [item.tokens], item.start
        while item.parent:
            item = self.items[item.parent]
            parts.append(item.tokens[: end - item.start])
            end = item.start
        return item.namespace, np.concatenate(parts[::-1])

    def bind(self, rows: Indices, pieces: list[RecordPart]) -> None:
        """Bind ``rows``, which point nowhere, to ``pieces``. O(rows)."""
        first = 0
        for piece in pieces:
            some = rows[first : first + piece.num_rows]
            self._records.put(some, piece.id)
            self._offsets.put(some, np.arange(piece.offset, piece.offset + len(some)))
            self._use(piece.id, len(some))
            first += piece.num_rows

    def unbind(self, rows: Indices, *, is_use: bool = False) -> None:
        """Unbind ``rows``. Records that are then not in use are the first to be removed, or the
        last with ``is_use``. O(rows)."""
        found, counts = np.unique(self._records.take(rows), return_counts=True)
        for number, count in zip(found.tolist(), counts.tolist(), strict=True):
            self._use(number, -count, is_use)
        self._records.put(rows, 0)

    def unbind_all(self) -> None:
        """Unbind all rows, and count everything else again from the items, because an exception may
        have cut another call. O(rows of the tier + items)."""
        self._found = None, EMPTY, []
        self._records[:] = 0
        self.ids = {item.key: number for number, item in self.items.items()}
        children = Counter(item.parent for item in self.items.values() if item.parent)
        self._num_uses = {number: children[number] for number in self.items}
        were_used = (number for number in reversed(self.items) if number not in self.unused)
        order = (*were_used, *self.unused)  # Records that are no longer used are removed first.
        self.unused = OrderedDict.fromkeys(n for n in order if self._num_uses.get(n) == 0)

    def parts(self, rows: Indices) -> list[RecordPart]:
        """Return the parts of records that ``rows`` point to, in the order of ``rows``. O(rows)."""
        if not len(rows):
            return []
        records, offsets = self._records.take(rows), self._offsets.take(rows)
        breaks = np.flatnonzero((np.diff(records) != 0) | (np.diff(offsets) != 1)) + 1
        firsts = [0, *breaks.tolist()]
        return [
            RecordPart(records.item(first), offsets.item(first), end - first)
            for first, end in zip(firsts, [*firsts[1:], len(rows)], strict=True)
        ]

    def check(self) -> None:
        """Raise AssertionError unless uses are counted correctly. O(items + rows of the tier)."""
        rows = self._records[self._records != 0].tolist()
        uses = Counter([*rows, *(item.parent for item in self.items.values() if item.parent)])
        assert {number: uses[number] for number in self.items} == self._num_uses
        assert uses.keys() <= self.items.keys(), "a row or an item points into a removed record"
        assert self.unused.keys() == self.items.keys() - uses.keys()

    def _use(self, number: int, change: int, is_last: bool = False) -> None:
        """Change the number of uses of an item, unless ``number`` is 0. Without uses it is removed
        first, or last."""
        if not number:
            return
        self._num_uses[number] += change
        if self._num_uses[number]:
            self.unused.pop(number, None)
        else:
            self.unused[number] = None
            self.unused.move_to_end(number, last=is_last)


def covering(pieces: list[RecordPart], first: int, end: int) -> list[RecordPart]:
    """Return the parts of ``pieces``, a path from position 0, that cover [first, end)."""
    found, at = [], 0
    for piece in pieces:
        low, high = max(first, at), min(end, at + piece.num_rows)
        if low < high:
            found.append(RecordPart(piece.id, piece.offset + low - at, high - low))
        at += piece.num_rows
    return found
