"""Which records hold the KV of a prefix, and a state at its end: a tree of runs of tokens.

A run is a record's tokens, which follow those of its parent's up to ``start``, a position anywhere
in the parent. Runs are never cut: a path that leaves one in its middle has its next run there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from hybridcache.tokens import Tokens, common_prefix_len


class Run(NamedTuple):
    """The tokens of one record of KV."""

    parent: int
    """Id of the record that it goes on from; 0: none, it begins a prompt."""
    start: int
    """Position of its first token."""
    tokens: Tokens
    namespace: Hashable

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class State(NamedTuple):
    """The place of one record of a state."""

    parent: int
    """Id of the run that has its position, behind its first token."""
    position: int


class Piece(NamedTuple):
    """Part of a run."""

    id: int
    offset: int
    """Of its first token in the run."""
    num_tokens: int


class Prefixes:
    """Runs and states by their ids, and in the order of their last use."""

    def __init__(self) -> None:
        self._children: dict[tuple[Hashable, int, int], int] = {}
        """By (parent, or the namespace of a prompt that begins; position; next token)."""
        self._states: dict[State, int] = {}
        self._num_below: dict[int, int] = {}
        """Runs and states that have it as their parent."""
        self.used: OrderedDict[int, Run | State] = OrderedDict()
        """All that there is by id, the one to go first in front. A parent is never before what
        hangs on it."""

    def __len__(self) -> int:
        return len(self.used)

    def __contains__(self, number: int) -> bool:
        return number in self.used

    def add(self, number: int, what: Run | State) -> bool:
        """Take ``what`` in as the last used. False: its parent is not known, or its place is
        taken."""
        if not self._fits(what):
            return False
        if isinstance(what, Run):
            self._children[self._key(what)] = number
        else:
            self._states[what] = number
        if what.parent:
            self._num_below[what.parent] += 1
        self._num_below[number] = 0
        self.used[number] = what
        self.refresh(number)
        return True

    def _fits(self, what: Run | State) -> bool:
        above = self.used.get(what.parent)
        if isinstance(what, State):
            if not isinstance(above, Run) or what in self._states:
                return False
            return above.start < what.position <= above.end
        if not len(what.tokens) or self._key(what) in self._children:
            return False
        if not what.parent:
            return what.start == 0
        if not isinstance(above, Run) or not above.start < what.start <= above.end:
            return False
        same = what.start < above.end and above.tokens[what.start - above.start] == what.tokens[0]
        return above.namespace == what.namespace and not same

    def remove(self, number: int) -> None:
        """``number``, on which nothing hangs, is no more."""
        what = self.used.pop(number)
        assert not self._num_below.pop(number), "something hangs on it"
        if isinstance(what, Run):
            del self._children[self._key(what)]
        else:
            del self._states[what]
        if what.parent:
            self._num_below[what.parent] -= 1

    def is_leaf(self, number: int) -> bool:
        """Whether nothing hangs on it."""
        return not self._num_below[number]

    def below(self, number: int) -> list[int]:
        """It and all that hangs on it, parents first. O(all)."""
        found = {number}
        for other in sorted(self.used):
            if self.used[other].parent in found:
                found.add(other)
        return sorted(found)

    def find(self, namespace: Hashable, tokens: Tokens) -> list[Piece]:
        """Whose KV the longest known prefix of ``tokens`` is, in order. O(len(tokens))."""
        pieces: list[Piece] = []
        above: Hashable = ("", namespace)
        at = 0
        while at < len(tokens):
            number = self._children.get((above, at, int(tokens[at])))
            if number is None:
                break
            run = self.used[number]
            assert isinstance(run, Run)
            num_tokens = common_prefix_len(run.tokens, tokens[at:])
            pieces.append(Piece(number, 0, num_tokens))
            at += num_tokens
            above = number
        return pieces

    def state(self, pieces: list[Piece], position: int) -> int | None:
        """The state at ``position`` on a path that ``find`` found."""
        at = 0
        for piece in pieces:
            if at < position <= at + piece.num_tokens:
                return self._states.get(State(piece.id, position))
            at += piece.num_tokens
        return None

    def touch(self, pieces: list[Piece], position: int) -> None:
        """A path that ``find`` found, and the state at ``position``, were used."""
        state = self.state(pieces, position)
        if state is not None:
            self.used.move_to_end(state)
        for piece in reversed(pieces):
            self.used.move_to_end(piece.id)

    def newest_states(self, room: int, state_rows: int) -> list[int]:
        """The states used last, the newest first, as many as ``room`` rows hold with all KV under
        them. O(states + runs on their paths)."""
        covered: dict[int, int] = {}
        found = []
        for number, what in reversed(self.used.items()):
            if not isinstance(what, State):
                continue
            room -= state_rows
            above, end = what.parent, what.position
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
        """(namespace, tokens from the first to its end). O(position)."""
        what = self.used[number]
        end = what.position if isinstance(what, State) else what.end
        run = self.used[what.parent] if isinstance(what, State) else what
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
        """It was used, and so was all that it hangs on."""
        while number:
            self.used.move_to_end(number)
            number = self.used[number].parent


def covering(pieces: list[Piece], first: int, end: int) -> list[Piece]:
    """The parts of ``pieces``, which begin at 0, that cover [first, end)."""
    found, at = [], 0
    for piece in pieces:
        low, high = max(first, at), min(end, at + piece.num_tokens)
        if low < high:
            found.append(Piece(piece.id, piece.offset + low - at, high - low))
        at += piece.num_tokens
    return found
