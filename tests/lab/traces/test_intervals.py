"""Tests of intervals against independent references: Student's quantiles, coverage, a plain
bootstrap."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hybridcache.lab.traces.intervals import interval, paired, ratio, student_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"), [(2, 4.3027), (4, 2.7764), (9, 2.2622), (29, 2.0452), (200, 1.9719)]
)
def test_student_quantiles_match_published_tables(degrees: int, expected: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(expected, abs=2e-4)


def test_paired_interval_cancels_the_variation_between_seeds() -> None:
    draw = random.Random(3)
    common = [draw.gauss(70, 10) for _ in range(10)]
    first = [value + 1 + draw.gauss(0, 0.2) for value in common]
    second = [value + draw.gauss(0, 0.2) for value in common]
    found = paired(first, second)
    assert found.low > 0 and found.high - found.low < 0.6
    assert not interval(first).low > interval(second).high, "unpaired intervals must overlap"
    assert found.mean == pytest.approx(np.mean(first) - np.mean(second))


def test_ratio_interval_agrees_with_a_plain_bootstrap() -> None:
    draw = random.Random(7)
    wholes = [draw.randrange(50, 500) for _ in range(40)]
    parts = [whole * draw.random() for whole in wholes]
    rates = []
    for _ in range(4000):
        chosen = [draw.randrange(40) for _ in range(40)]
        rates.append(sum(parts[i] for i in chosen) / sum(wholes[i] for i in chosen))
    rates.sort()
    found = ratio(parts, wholes)
    # The expanded limits are a little outside of the plain ones.
    assert 0.8 < (rates[3900] - rates[99]) / (found.high - found.low) < 1.02
    assert found.low < sum(parts) / sum(wholes) < found.high
