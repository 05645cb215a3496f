"""Vectorised hazards of all classes, compared with plain Python by class and bin."""

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

from hybridcache.policies.eviction.survival import (
    DOUBT,
    EDGES,
    NUM_BINS,
    UNUSED,
    WEIGHT,
    WIDTHS,
    Hazards,
    _cells,
    index_of,
)
from hybridcache.policies.placement import MEMORY

EDGE_LIST: list[int] = EDGES.tolist()
WIDTH_LIST: list[float] = WIDTHS.tolist()
MAX_OPEN = 4
KEYS = tuple((top, middle, leaf) for top in "ab" for middle in range(2) for leaf in range(3))
PRIORS = {"a": 1.0, "b": 0.125}
MODEL_FACTOR = 0.25


def model_of(key: tuple[object, ...]) -> tuple[object, ...] | None:
    """Return the class that a class of "b" begins as, if classes have models."""
    return ("a", key[1]) if len(key) == 2 and key[0] == "b" else None


def bin_of(age: int) -> int:
    return bisect_right(EDGE_LIST, age) - 1


class PlainHazards:
    """Plain hazards: every figure is computed from the list of all stages."""

    def __init__(self, general_from: int, has_models: bool) -> None:
        self.general_from, self.has_models = general_from, has_models
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

    def counts(self, key: tuple[object, ...], now: int) -> tuple[list[float], list[float]]:
        """Return uses and time at risk by bin of the class ``key``, including its subclasses."""
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
        return uses, exposure

    def shape(self, key: tuple[object, ...], now: int) -> list[float]:
        """Return the hazard of the parent class or of the model of ``key``, or the assumed one."""
        model = self.model_of(key)
        if model is not None:
            return [MODEL_FACTOR * part for part in self.hazard(model, now)]
        if len(key) > 1:
            return self.hazard(key[:-1], now)
        middles = [edge + width / 2 for edge, width in zip(EDGE_LIST, WIDTH_LIST, strict=True)]
        return [PRIORS[str(key[0])] / (middle + UNUSED) for middle in middles]

    def model_of(self, key: tuple[object, ...]) -> tuple[object, ...] | None:
        return model_of(key) if self.has_models else None

    def effect(self, key: tuple[object, ...], now: int) -> float:
        """Return actual per expected uses of all classes with the last feature of ``key``, or of
        all with a model and the same parent."""
        has_model = self.model_of(key) is not None
        if not has_model and len(key) <= self.general_from:
            return 1.0
        uses = expected = 0.0
        peers = {of[: len(key)] for of in KEYS}
        similar = {
            of
            for of in peers
            if (self.model_of(of) is not None) == has_model
            and (of[:-1] == key[:-1] if has_model else of[-1] == key[-1])
        }
        for other in similar:
            used, exposure = self.counts(other, now)
            uses += sum(used)
            expected += dot(exposure, self.shape(other, now))
        return level(uses, expected, DOUBT, WEIGHT)

    def hazard(self, key: tuple[object, ...], now: int) -> list[float]:
        """Return the hazard by bin of the class ``key``, including its subclasses."""
        uses, exposure = self.counts(key, now)
        effect = self.effect(key, now)
        shape = [part * effect for part in self.shape(key, now)]
        doubt = DOUBT if len(key) > 1 and self.model_of(key) is None else 0.0
        ratio = level(sum(uses), dot(exposure, shape), doubt, 1.0)
        return [
            (used + WEIGHT) / (at_risk + WEIGHT / (ratio * part))
            for used, at_risk, part in zip(uses, exposure, shape, strict=True)
        ]


def dot(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def level(uses: float, expected: float, doubt: float, added: float) -> float:
    difference = uses - expected
    clear = max(0.0, abs(difference) - doubt * sqrt(max(uses, expected, 1.0)))
    believed = expected + (clear if difference > 0 else -clear)
    return max((believed + added) / (expected + added), 1e-3)


def plain_index(hazard: list[float], start: int) -> float:
    """Return the highest rate of uses of an item kept from bin ``start`` on, over all ends."""
    best = spent = 0.0
    alive = 1.0
    for each in range(start, NUM_BINS):
        step = min(hazard[each] * WIDTH_LIST[each], 8.0)
        spent += alive * -expm1(-step) * WIDTH_LIST[each] / step
        alive *= exp(-step)
        best = max(best, (1.0 - alive) / spent)
    return best


class HazardsMachine(RuleBasedStateMachine):
    """Stages of a few classes that open, end and exceed the limit of open stages."""

    @initialize(general_from=st.integers(1, 3), has_models=st.booleans())
    def make(self, general_from: int, has_models: bool) -> None:
        self.survival = Hazards(MAX_OPEN, general_from=general_from)
        self.plain, self.now = PlainHazards(general_from, has_models), 0
        self.rows: dict[tuple[object, ...], int] = {}

    @rule(requests=st.sampled_from([1, 1, 3, 40, 700]))
    def wait(self, requests: int) -> None:
        self.now += requests

    @rule(key=st.sampled_from(KEYS))
    def enter(self, key: tuple[object, ...]) -> None:
        if len(self.plain.open) == MAX_OPEN:
            self.plain.close(min(self.plain.open), self.now, used=False)
        prior, model = PRIORS[str(key[0])], self.plain.model_of(key[:2])
        if model is not None:
            self.survival.row(model, PRIORS[str(model[0])])
            self.survival.row(key[:2], prior, (model, MODEL_FACTOR))
        self.rows[key] = self.survival.row(key, prior)
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
    def invariants_hold(self) -> None:
        self.survival.check()


def test_vectorised_hazards_match_plain_ones() -> None:
    run_state_machine_as_test(
        HazardsMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


def test_hazards_without_a_class_are_refreshed_every_64_requests() -> None:
    hazards = Hazards()
    assert [hazards.refresh(now) for now in (63, 64, 127, 128)] == [False, True, False, True]


def test_open_stages_spread_the_cost_of_a_refresh() -> None:
    """Hazards wait one request for every 32 open stages, rounded down."""
    hazards = Hazards()
    row = hazards.row(("a",))
    for _ in range(2300):
        hazards.open(row, 0)
    assert [hazards.refresh(now) for now in (70, 71)] == [False, True]


def test_halving_the_counts_of_a_class_leaves_its_index() -> None:
    """More than ``MEMORY`` stages ended at age 0, each in a use after half a request."""
    hazards, found = Hazards(), []
    row = hazards.row(("a",))
    for _ in range(2 * MEMORY):
        hazards.close(hazards.open(row, 0), 0, used=True)
    for now in (64, 256):
        assert hazards.refresh(now)
        found.append(hazards.index_at(row, 0))
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_an_age_at_the_edge_of_a_bin_is_in_that_bin() -> None:
    hazards = Hazards()
    hazards.index[0] = range(NUM_BINS)
    assert [hazards.index_at(0, edge) for edge in EDGES.tolist()] == [*range(len(EDGES))]
    assert hazards.index_at(0, int(EDGES[9]) - 1) == 8
    ages = [*range(-2, 70_000), *(edge + step for edge in EDGE_LIST[30:] for step in (-1, 0, 1))]
    assert _cells(np.array(0), np.array(ages))[0].tolist() == [bin_of(max(age, 0)) for age in ages]


def test_the_index_of_several_classes_matches_the_plain_one() -> None:
    hazard = np.random.default_rng(0).uniform(0.01, 0.5, (7, NUM_BINS)) / (EDGES + 16.0)
    plain = [plain_index(hazard[3].tolist(), start) for start in range(NUM_BINS)]
    assert index_of(hazard)[3] == pytest.approx(plain, rel=1e-6)
