"""Where the newest state of every running sequence lies, so that taking over what a verification
computed moves no byte.

A verification writes the state after each of its tokens into a step slot. The one that is taken
stays there: the sequence is *away*, and its next verification reads it from there, with the
sequence's own slot, which holds nothing that anybody wants, as one of its step slots. So as many
are needed as tokens are verified in a step, however many sequences are away. A sequence that does
anything else comes *home* first, by one copy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class RunningStates:
    """Own slots and step slots of what runs. Integers only; who calls does the copies."""

    def __init__(self, step_slots: Sequence[int]) -> None:
        self._step_slots = frozenset(step_slots)
        self._free = list(reversed(step_slots))
        self._away: dict[int, int] = {}
        """Own slot to the step slot that the state lies in."""
        self._verified: list[tuple[int, list[int]]] = []
        """Of the last step: own slot, and where the state after each token is."""

    def at(self, slot: int) -> int:
        """Where the newest state of the sequence with this own slot lies."""
        return self._away.get(slot, slot)

    @property
    def step_slots(self) -> list[list[int]]:
        """Of each sequence that the last step verified: the slot of the state after each token."""
        return [slots for _, slots in self._verified]

    def astray(self, but: Collection[int] = ()) -> list[tuple[int, int]]:
        """(step slot, own slot) of who is away, but for the sequences with these own slots and
        those that are verified: to be copied, and then to ``come_home``."""
        if not self._away:
            return []
        stay = {*but, *(own for own, _ in self._verified)}
        return [(step, own) for own, step in self._away.items() if own not in stay]

    def come_home(self, copied: Sequence[tuple[int, int]]) -> None:
        """What was ``astray`` is in its own slot now."""
        for step, own in copied:
            del self._away[own]
            self._free.append(step)

    def give_up(self) -> None:
        """The last step broke off before its commit, if it verified any: nobody wants the states of
        these sequences."""
        for own, slots in self._verified:
            self._free += [slot for slot in slots if slot != own]
            if own in self._away:
                self._free.append(self._away.pop(own))
        self._verified = []

    def verify(self, sequences: Sequence[tuple[int, int]]) -> None:
        """Give each of these (own slot, number of tokens) its ``step_slots``; everybody else is at
        home. AssertionError for more tokens than there are step slots."""
        for own, count in sequences:
            last = [own] if own in self._away else []
            first = len(self._free) - count + len(last)
            assert first >= 0, "more tokens to verify than were planned"
            self._verified.append((own, self._free[first:][::-1] + last))
            del self._free[first:]

    def take(self, counts: Sequence[int]) -> None:
        """Of each verified sequence so many tokens count; 0: its state is what it was."""
        for (own, slots), count in zip(self._verified, counts, strict=True):
            if count:
                before, taken = self._away.pop(own, None), slots.pop(count - 1)
                if taken != own:
                    self._away[own] = taken
                if before is not None:
                    self._free.append(before)
            self._free += [slot for slot in slots if slot != own]
        self._verified = []

    def check(self) -> None:
        """AssertionError unless every step slot is free, holds the state of one sequence, or is
        given to one token."""
        given = [slot for own, slots in self._verified for slot in slots if slot != own]
        held = [*self._free, *self._away.values(), *given]
        assert len(held) == len(self._step_slots) and set(held) == self._step_slots
        assert not self._step_slots & set(self._away), "a step slot is nobody's own"
