"""Index of the records by prefix: a tree of runs of tokens, with states on them.

A run has the tokens of one KV record. They follow the tokens of its parent up to ``start``, which
is any position in the parent. Runs are never split: a path that leaves a run in its middle
continues with a run that starts there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from typing import NamedTuple

import numpy as np

from hybridcache.tokens import Indices, Tokens, common_prefix_len


class RecordPart(NamedTuple):
    """Consecutive rows of one record: of a state, or one for each token of a run."""

    id: int
    """Id of the record, or 0 for rows that point nowhere."""
    offset: int
    """Index of the first row in the record."""
    num_rows: int


class Pointers:
    """A record id and a row of that record for each row of a tier.

    Rows that are together in a record are requested together, so all methods work on runs of rows.
    """

    def __init__(self, num_rows: int) -> None:
        self._records = np.zeros(num_rows, np.int64)
        """Record id of each row, or 0 if it points nowhere."""
        self._offsets = np.zeros(num_rows, np.int32)
        self._counts: dict[int, int] = {}
        """Number of rows that point into each record."""

    def __contains__(self, record: int) -> bool:
        """Return True if a row points into ``record``. O(1)."""
        return record in self._counts

    def bind(self, rows: Indices, pieces: list[RecordPart]) -> None:
        """Bind ``rows`` to ``pieces``. Rows after the end of the pieces point nowhere. O(rows)."""
        self.unbind(rows)
        first = 0
        for piece in pieces:
            some = rows[first : first + piece.num_rows]
            if not len(some):
                return
            self._records[some] = piece.id
            self._offsets[some] = np.arange(piece.offset, piece.offset + len(some), dtype=np.int32)
            self._counts[piece.id] = self._counts.get(piece.id, 0) + len(some)
            first += piece.num_rows

    def unbind(self, rows: Indices) -> Collection[int]:
        """Unbind ``rows``. Returns the records they pointed into. O(rows)."""
        found: dict[int, None] = {}
        for part in self.parts(rows):
            if part.id:
                found[part.id] = None
                self._counts[part.id] -= part.num_rows
                if not self._counts[part.id]:
                    del self._counts[part.id]
        self._records[rows] = 0
        return found

    def parts(self, rows: Indices) -> list[RecordPart]:
        """Return the parts of records that ``rows`` point to, in the order of ``rows``. O(rows)."""
        if not len(rows):
            return []
        records, offsets = self._records[rows], self._offsets[rows]
        breaks = np.flatnonzero((np.diff(records) != 0) | (np.diff(offsets) != 1)) + 1
        firsts = [0, *breaks.tolist()]
        return [
            RecordPart(records.item(first), offsets.item(first), end - first)
            for first, end in zip(firsts, [*firsts[1:], len(rows)], strict=True)
        ]

    def lose(self, records: Iterable[int]) -> bool:
        """Unbind ``records``. Returns False if no row had them. O(rows of the tier)."""
        found = [record for record in records if self._counts.pop(record, None) is not None]
        if found:
            self._records[np.isin(self._records, found)] = 0
        return bool(found)

    def clear(self) -> None:
        """Unbind all rows. O(rows of the tier)."""
        self._records[:] = 0
        self._counts.clear()

    def check(self) -> None:
        """Raise AssertionError unless the counts per record are right. O(rows of the tier)."""
        records, counts = np.unique(self._records[self._records != 0], return_counts=True)
        found = dict(zip(records.tolist(), counts.tolist(), strict=True))
        assert found == self._counts, f"rows point into {found}, counted {self._counts}"


class Run(NamedTuple):
    """The tokens of one record of KV."""

    parent: int
    """Id of the run that it continues, or 0 if it begins a prompt."""
    start: int
    """Position of its first token."""
    tokens: Tokens
    namespace: Hashable

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class State(NamedTuple):
    """The position of one state record."""

    parent: int
    """Id of the run that contains its position, after the first token of the run."""
    position: int


class Prefixes:
    """Runs and states by id, and in the order of their last use."""

    def __init__(self) -> None:
        self._children: dict[tuple[Hashable, int, int], int] = {}
        """Runs by (parent, or the namespace for the first run of a prompt; position; token)."""
        self.states: dict[State, int] = {}
        """Ids of all states."""
        self._num_children: dict[int, int] = {}
        """Number of children of each run."""
        self.used: OrderedDict[int, Run | State] = OrderedDict()
        """All items by id, the least recently used first. A parent comes after its children."""

    def __len__(self) -> int:
        return len(self.used)

    def __contains__(self, number: int) -> bool:
        return number in self.used

    def add(self, number: int, item: Run | State) -> bool:
        """Add an item as the last used. Returns False without a parent, or if it exists."""
        if item.parent and item.parent not in self.used:
            return False
        if isinstance(item, State):
            if item in self.states:
                return False
            self.states[item] = number
        else:
            if self._key(item) in self._children:
                return False
            self._children[self._key(item)] = number
        if item.parent:
            self._num_children[item.parent] += 1
        self._num_children[number] = 0
        self.used[number] = item
        self.refresh(number)
        return True

    def remove(self, number: int) -> None:
        """Remove an item without children."""
        item = self.used.pop(number)
        assert not self._num_children.pop(number), "the item has children"
        if isinstance(item, Run):
            del self._children[self._key(item)]
        else:
            del self.states[item]
        if item.parent:
            self._num_children[item.parent] -= 1

    def is_leaf(self, number: int) -> bool:
        """Return True if the item has no children."""
        return not self._num_children[number]

    def descendants(self, numbers: Iterable[int]) -> list[int]:
        """Return existing items and all descendants, parents first. O(all items)."""
        found = {number for number in numbers if number in self.used}
        for other in sorted(self.used):
            if self.used[other].parent in found:
                found.add(other)
        return sorted(found)

    def find(self, namespace: Hashable, tokens: Tokens) -> list[RecordPart]:
        """Return the runs of the longest stored prefix of ``tokens``. O(len(tokens))."""
        pieces: list[RecordPart] = []
        above: Hashable = ("", namespace)
        at = 0
        while at < len(tokens):
            number = self._children.get((above, at, int(tokens[at])))
            if number is None:
                break
            run = self.used[number]
            assert isinstance(run, Run)
            num_tokens = common_prefix_len(run.tokens, tokens[at:])
            pieces.append(RecordPart(number, 0, num_tokens))
            at += num_tokens
            above = number
        return pieces

    def newest_states(self, room: int, state_rows: int) -> list[int]:
        """Return the last used states, newest first: as many as fit into ``room`` rows together
        with their KV.

        O(states + runs on their paths).
        """
        covered: dict[int, int] = {}
        found = []
        for number, item in reversed(self.used.items()):
            if not isinstance(item, State):
                continue
            room -= state_rows
            above, end = item.parent, item.position
            while above:
                run = self.used[above]
                assert isinstance(run, Run)
                known = covered.get(above, 0)
                if end - run.start > known:
                    room -= end - run.start - known
                    covered[above] = end - run.start
                above, end = run.parent, run.start
            if room < 0:
                break
            found.append(number)
        return found

    def path(self, number: int) -> tuple[Hashable, Tokens]:
        """Return (namespace, all tokens up to the end of the item). O(position)."""
        item = self.used[number]
        end = item.position if isinstance(item, State) else item.end
        run = self.used[item.parent] if isinstance(item, State) else item
        parts: list[Tokens] = []
        while True:
            assert isinstance(run, Run)
            parts.append(run.tokens[: end - run.start])
            if not run.parent:
                return run.namespace, np.concatenate(parts[::-1])
            end, run = run.start, self.used[run.parent]

    def _key(self, run: Run) -> tuple[Hashable, int, int]:
        above: Hashable = run.parent or ("", run.namespace)
        return above, run.start, int(run.tokens[0])

    def refresh(self, number: int) -> None:
        """Mark an item and its ancestors as used."""
        while number:
            self.used.move_to_end(number)
            number = self.used[number].parent


def covering(pieces: list[RecordPart], first: int, end: int) -> list[RecordPart]:
    """Return the parts of ``pieces``, a path from position 0, that cover [first, end)."""
    found, at = [], 0
    for piece in pieces:
        low, high = max(first, at), min(end, at + piece.num_rows)
        if low < high:
            found.append(RecordPart(piece.id, piece.offset + low - at, high - low))
        at += piece.num_rows
    return found
