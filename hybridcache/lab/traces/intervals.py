"""Intervals for hit rates: paired differences, bootstrap over sessions and seeds.

Seeds of a generator are independent traces: one number each. Sessions of one trace share a cache;
the rate is a ratio of sums, and sessions are the units drawn again. Compared policies run on the
same units, so effects that a seed has on all policies cancel.

>>> print(paired([71.0, 69.5, 70.2, 70.9, 71.4], [70.1, 68.9, 69.0, 70.1, 70.6]))
0.9 [0.6, 1.1]

Intervals are expanded percentile intervals (T. Hesterberg, "What Teachers Should Know About the
Bootstrap", The American Statistician 69(4), 2015, section 4.3), which keep their coverage in small
samples. Fewer than five units give no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 4000
FEWEST_UNITS = 5
PERCENTILES = (5, 50, 95, 99)


class Interval(NamedTuple):
    """A mean with the limits of its interval; the limits are NaN if there are too few units."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        """Return mean and limits, each formatted with ``spec`` (default ``.1f``)."""
        mean, low, high = (format(part, spec or ".1f") for part in self)
        return mean if math.isnan(self.low) else f"{mean} [{low}, {high}]"

    @property
    def half_width(self) -> float:
        """Half of the distance between the limits; NaN if there are too few units."""
        return (self.high - self.low) / 2

    def scaled(self, factor: float) -> Interval:
        """Return the interval of ``factor`` times the quantity; ``factor`` must be positive."""
        return Interval(*(factor * part for part in self))


class RateInterval(Interval):
    """A rate, 0 to 1, with the limits of its interval, which are cut at 0 and 1. Printed in
    percent.

    >>> print(RateInterval(0.355, 0.302, 0.408), RateInterval(0.97, 0.91, 1.03), sep=", ")
    35.5 [30.2, 40.8] %, 97.0 [91.0, 100.0] %
    """

    __slots__ = ()

    def __new__(cls, mean: float, low: float, high: float) -> RateInterval:
        return super().__new__(cls, mean, max(low, 0.0), min(high, 1.0))  # NaN stays NaN

    @property
    def is_cut(self) -> bool:
        """True if a limit was cut, so that the other one is farther from the mean."""
        return abs(self.high - self.mean - (self.mean - self.low)) > 1e-9

    def __format__(self, spec: str) -> str:
        """Return percentages; with a ``spec``, the rates as they are."""
        return super().__format__(spec) if spec else f"{self.scaled(100)} %"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of one value per unit, for example one rate per seed. O(resamples * n)."""
    return ratio(values, np.ones(len(values)))


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the mean of ``first - second``, unit by unit. ValueError if the lengths differ."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    return interval(differences.round(12).tolist())


def ratio(parts: Sequence[float] | np.ndarray, wholes: Sequence[float] | np.ndarray) -> Interval:
    """Return ``sum(parts) / sum(wholes)`` with units drawn again with replacement: of a token hit
    rate, reused tokens and prompt tokens of each session."""
    parts, wholes = np.asarray(parts, float), np.asarray(wholes, float)
    mean = float(parts.sum() / wholes.sum())
    if len(parts) < FEWEST_UNITS:
        return Interval(mean, math.nan, math.nan)
    drawn = np.random.default_rng(0).integers(len(parts), size=(RESAMPLES, len(parts)))
    rates = parts[drawn].sum(axis=1) / wholes[drawn].sum(axis=1)
    # The bootstrap underestimates the spread by ``sqrt((n - 1) / n)`` and uses the normal quantile
    # in place of Student's: the tail is smaller than ``(1 - LEVEL) / 2``.
    quantile = student_quantile((1 + LEVEL) / 2, len(parts) - 1)
    tail = NormalDist().cdf(-math.sqrt(len(parts) / (len(parts) - 1)) * quantile)
    low, high = np.quantile(rates, (tail, 1 - tail))
    return Interval(mean, float(low), float(high))


def linear_ratio(
    parts: Sequence[float] | np.ndarray, wholes: Sequence[float] | np.ndarray
) -> Interval:
    """Return ``sum(parts) / sum(wholes)`` with the interval of its linearisation and Student's
    quantile. O(n), against O(resamples * n) of ``ratio``; tests compare the two.

    >>> print(format(linear_ratio([8, 7, 9, 6, 8], [10] * 5), ".2f"))
    0.76 [0.62, 0.90]
    """
    parts, wholes = np.asarray(parts, float), np.asarray(wholes, float)
    num_units, total = len(parts), wholes.sum()
    mean = float(parts.sum() / total) if total else 0.0
    if num_units < FEWEST_UNITS:
        return Interval(mean, math.nan, math.nan)
    residuals = parts - mean * wholes
    variance = num_units / (num_units - 1) * float(residuals @ residuals)
    half = student_quantile((1 + LEVEL) / 2, num_units - 1) * math.sqrt(variance) / float(total)
    return Interval(mean, mean - half, mean + half)


@cache
def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's distribution for a probability above one half."""
    # With x = sqrt(degrees) tan(angle) the density becomes a power of the cosine.
    angles = np.linspace(0, math.pi / 2, 200_001)
    heights = np.cos(angles) ** (degrees - 1)
    areas = np.concatenate(([0.0], np.cumsum(heights[1:] + heights[:-1])))
    angle = float(np.interp((2 * probability - 1) * areas[-1], areas, angles))
    return math.sqrt(degrees) * math.tan(angle)


def percentiles(values: np.ndarray) -> dict[int, float]:
    """Return ``PERCENTILES`` of float64[n]; all 0 if there are no values. O(n)."""
    found = np.percentile(values, PERCENTILES).tolist() if len(values) else [0.0] * len(PERCENTILES)
    return dict(zip(PERCENTILES, found, strict=True))
