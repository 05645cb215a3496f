"""Tests of ``Pointers``, which map rows to records, compared with a dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.plugins.tiers.prefixes import Pointers, RunPart
from hybridcache.tokens import Indices

NUM_ROWS = 30
ROWS = st.lists(st.integers(0, NUM_ROWS - 1), unique=True, max_size=20)
PIECES = st.lists(
    st.builds(RunPart, st.integers(1, 4), st.integers(0, 9), st.integers(1, 8)), max_size=4
)


def array(rows: list[int]) -> Indices:
    return np.array(rows, np.int32)


class PointersMachine(RuleBasedStateMachine):
    """State machine of all operations on ``Pointers``."""

    def __init__(self) -> None:
        super().__init__()
        self.pointers = Pointers(NUM_ROWS)
        self.model: dict[int, tuple[int, int]] = {}

    @rule(rows=ROWS, pieces=PIECES)
    def bind(self, rows: list[int], pieces: list[RunPart]) -> None:
        self.pointers.bind(array(rows), pieces)
        places = [(one.id, one.offset + i) for one in pieces for i in range(one.num_tokens)]
        for row in rows:
            self.model.pop(row, None)
        self.model.update(zip(rows, places, strict=False))

    @rule(rows=ROWS)
    def unbind(self, rows: list[int]) -> None:
        found = self.pointers.unbind(array(rows))
        expected = [self.model.pop(row)[0] for row in rows if row in self.model]
        assert sorted(found) == sorted(set(expected))

    @rule(record=st.integers(1, 4))
    def lose(self, record: int) -> None:
        self.pointers.lose(record)
        self.model = {row: place for row, place in self.model.items() if place[0] != record}

    @rule()
    def clear(self) -> None:
        self.pointers.clear()
        self.model.clear()

    @rule(rows=ROWS)
    def look_up(self, rows: list[int]) -> None:
        parts = self.pointers.parts(array(rows))
        covered = [
            place for part in parts for place in range(part.first, part.first + part.num_rows)
        ]
        assert covered == list(range(len(rows))), "a row is missing or repeated"
        for part in parts:
            for i, row in enumerate(rows[part.first : part.first + part.num_rows]):
                if part.record:
                    assert self.model[row] == (part.record, part.offset + i)
                else:
                    assert row not in self.model

    @invariant()
    def records_match_the_model(self) -> None:
        self.pointers.check()
        living = {record for record, _ in self.model.values()}
        assert {record for record in range(1, 5) if record in self.pointers} == living


TestPointers = PointersMachine.TestCase
