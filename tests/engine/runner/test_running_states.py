"""Tests of ``RunningStates`` against a model in which every state stays in its own slot."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.runner.verification import RunningStates

OWN, STEPS = range(4), range(10, 20)


class RunningStatesMachine(RuleBasedStateMachine):
    """State machine in which a slot contains the position that its state stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.running = RunningStates(STEPS)
        self.slots = dict.fromkeys((*OWN, *STEPS), 0)
        self.positions = dict.fromkeys(OWN, 0)

    def copy(self, copies: list[tuple[int, int]]) -> None:
        for step, own in copies:
            self.slots[own] = self.slots[step]

    @rule(
        lengths=st.dictionaries(st.sampled_from(OWN), st.integers(2, 9), max_size=4),
        moves=st.booleans(),
        data=st.data(),
    )
    def verify(self, lengths: dict[int, int], moves: bool, data: st.DataObject) -> None:
        while sum(lengths.values()) > len(STEPS):
            lengths.popitem()
        self.copy(self.running.place(list(lengths.items()), moves=moves))
        written = [slot for slots in self.running.step_slots for slot in slots]
        assert len(set(written)) == len(written) == sum(lengths.values())
        for (own, length), slots in zip(lengths.items(), self.running.step_slots, strict=True):
            assert len(slots) == length
            before = self.running.at(own)
            assert self.slots[before] == self.positions[own] and before not in written
            for step, slot in enumerate(slots):
                self.slots[slot] = self.positions[own] + step + 1
        self.running.check()
        self.copy(self.running.settle())  # States under verification stay in place.
        if data.draw(st.booleans(), label="step failed"):
            self.copy(self.running.place((), moves=moves))
            for own in lengths:  # The slot belongs to another request from here on.
                self.slots[own] = self.positions[own] = 0
            return
        taken = [data.draw(st.integers(0, length)) for length in lengths.values()]
        self.running.take(taken)
        for own, count in zip(lengths, taken, strict=True):
            self.positions[own] += count

    @rule(own=st.sampled_from(OWN))
    def decode(self, own: int) -> None:
        self.copy(self.running.place((), moves=False))
        assert self.slots[own] == self.positions[own]
        self.slots[own] = self.positions[own] = self.positions[own] + 1

    @invariant()
    def slots_hold_the_newest_states(self) -> None:
        self.running.check()
        for own, position in self.positions.items():
            assert self.slots[self.running.at(own)] == position


TestRunningStates = RunningStatesMachine.TestCase
TestRunningStates.settings = settings(max_examples=100, stateful_step_count=20)
