"""Hazards of all classes at once against the same class by class, bin by bin, in plain Python."""

from __future__ import annotations

from bisect import bisect_right
from math import exp, expm1, sqrt

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hybridcache.policies.eviction.hazards import (
    DOUBT,
    EDGES,
    NUM_BINS,
    SHAPE_WEIGHT,
    TOP_WEIGHT,
    WIDTHS,
    Hazards,
    index_of,
)

EDGE_LIST: list[int] = EDGES.tolist()
WIDTH_LIST: list[float] = WIDTHS.tolist()
MAX_OPEN = 4
KEYS = tuple((top, middle, leaf) for top in "ab" for middle in range(2) for leaf in range(3))
PRIORS = {"a": 1.0, "b": 0.125}


def bin_of(age: int) -> int:
    return bisect_right(EDGE_LIST, age) - 1


class PlainSurvival:
    """What every stage did, in one list; all is added up anew whenever it is asked for."""

    def __init__(self) -> None:
        self.classes: list[tuple[object, ...]] = []
        self.open: dict[int, tuple[tuple[object, ...], int]] = {}
        self.ended: list[tuple[tuple[object, ...], int]] = []
        self.used: list[tuple[tuple[object, ...], int]] = []

    def close(self, stage: int, now: int, used: bool) -> None:
        if stage not in self.open:
            return
        key, entered = self.open.pop(stage)
        self.ended.append((key, now - entered))
        if used:
            self.used.append(self.ended[-1])

    def hazard(self, key: tuple[object, ...], now: int) -> list[float]:
        """Of the class ``key``, what lies below it included."""
        lived = [(of, now - entered) for of, entered in self.open.values()] + self.ended
        ages = [age for of, age in lived if of[: len(key)] == key]
        uses, exposure = [0.0] * NUM_BINS, [0.0] * NUM_BINS
        for of, age in self.used:
            uses[bin_of(age)] += of[: len(key)] == key
        for age in ages:
            reached = bin_of(age)
            exposure[reached] += age - EDGE_LIST[reached] + 0.5
            for each in range(reached):
                exposure[each] += WIDTH_LIST[each]
        weight, doubt = SHAPE_WEIGHT, DOUBT
        if len(key) > 1:
            shape = self.hazard(key[:-1], now)
        else:
            weight, doubt = TOP_WEIGHT, 0.0
            middles = [edge + width / 2 for edge, width in zip(EDGE_LIST, WIDTH_LIST, strict=True)]
            shape = [PRIORS[str(key[0])] / (middle + 16.0) for middle in middles]
        foretold = sum(at_risk * part for at_risk, part in zip(exposure, shape, strict=True))
        difference = sum(uses) - foretold
        clear = max(0.0, abs(difference) - doubt * sqrt(max(sum(uses), foretold, 1.0)))
        believed = foretold + (clear if difference > 0 else -clear)
        level = max((believed + 1.0) / (foretold + 1.0), 1e-3)
        return [
            (used + weight) / (at_risk + weight / (level * part))
            for used, at_risk, part in zip(uses, exposure, shape, strict=True)
        ]


def plain_index(hazard: list[float], start: int) -> float:
    """The best rate of uses that keeping from ``start`` on gives, over all ends."""
    best = spent = 0.0
    alive = 1.0
    for each in range(start, NUM_BINS):
        step = min(hazard[each] * WIDTH_LIST[each], 8.0)
        spent += alive * -expm1(-step) * WIDTH_LIST[each] / step
        alive *= exp(-step)
        best = max(best, (1.0 - alive) / spent)
    return best


class SurvivalMachine(RuleBasedStateMachine):
    """Stages of a few classes that open, end and overflow."""

    @initialize()
    def make(self) -> None:
        self.survival, self.plain, self.now = Hazards(MAX_OPEN), PlainSurvival(), 0
        self.rows: dict[tuple[object, ...], int] = {}

    @rule(requests=st.sampled_from([1, 1, 3, 40, 700]))
    def wait(self, requests: int) -> None:
        self.now += requests

    @rule(key=st.sampled_from(KEYS))
    def enter(self, key: tuple[object, ...]) -> None:
        if len(self.plain.open) == MAX_OPEN:
            self.plain.close(min(self.plain.open), self.now, used=False)
        self.rows[key] = self.survival.row(key, PRIORS[str(key[0])])
        stage = self.survival.open(self.rows[key], self.now)
        self.plain.open[stage] = key, self.now

    @precondition(lambda self: self.plain.open)
    @rule(data=st.data(), used=st.booleans(), twice=st.booleans())
    def end(self, data: st.DataObject, used: bool, twice: bool) -> None:
        stage = data.draw(st.sampled_from(sorted(self.plain.open)))
        for _ in range(1 + twice):
            self.survival.close(stage, self.now, used)
            self.plain.close(stage, self.now, used)

    @precondition(lambda self: self.rows)
    @rule()
    def compare(self) -> None:
        if not self.survival.refresh(self.now):
            return
        near = bin_of(self.now) + 1
        for key, row in self.rows.items():
            hazard = self.plain.hazard(key, self.now)
            wanted = [plain_index(hazard, start) for start in range(near)]
            assert self.survival.index[row, :near] == pytest.approx(wanted, rel=1e-6), key
            assert self.survival.index_at(row, self.now) == self.survival.index[row, near - 1]

    @invariant()
    def sound(self) -> None:
        self.survival.check()


def test_all_classes_at_once_are_each_class_by_itself() -> None:
    run_state_machine_as_test(
        SurvivalMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


def test_the_first_bins_alone_are_what_they_are_among_all() -> None:
    hazard = np.random.default_rng(0).uniform(0.01, 0.5, (7, NUM_BINS)) / (EDGES + 16.0)
    assert np.array_equal(index_of(hazard, 9), index_of(hazard)[:, :9])
    plain = [plain_index(hazard[3].tolist(), start) for start in range(NUM_BINS)]
    assert index_of(hazard)[3] == pytest.approx(plain, rel=1e-6)
