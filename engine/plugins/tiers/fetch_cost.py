"""Fetch or compute again: seconds of copy against seconds of prefill, both as they were measured
here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from engine.schedule.plan import Plan
from hybridcache.allocators.moves import DISK
from hybridcache.geometry.model import ModelGeometry

FADING = 0.95
"""What a step says counts for so much less after the next."""
UNIT = 1e9
SPREAD = 0.1
"""Steps that differ by less in their operations, of the mean, show no line."""


class MeasuredExchange:
    """A ``FetchRule`` that learns while the engine serves.

    A step's operations are the model's geometry; what a step costs here beside them, and what one
    operation costs, is the line through the prefill steps so far, the latest most of all. Only the
    operations are saved by a fetch. What is not measured yet is taken to be worth trying.
    """

    def __init__(
        self, geometry: ModelGeometry, bytes_per_s: Callable[[], Mapping[str, float | None]]
    ) -> None:
        """``bytes_per_s``: from each tier to the device, as measured so far."""
        self._geometry = geometry
        self._bytes_per_s = bytes_per_s
        self._sums = np.zeros(5)
        """Over steps: 1, x, y, xx, xy of operations x, in units of ``UNIT``, and seconds y."""
        self.after_reading = AfterReading(self)
        """For a request whose part of the disk was read while it waited: that is paid."""

    @property
    def seconds_per_operation(self) -> float | None:
        """None: no prefill was measured."""
        count, x, y, xx, xy = self._sums.tolist()
        if not x:
            return None
        variance = xx / count - (x / count) ** 2
        if variance > (SPREAD * x / count) ** 2:
            slope = (xy / count - x * y / count**2) / variance
            if slope > 0:
                return float(slope / UNIT)
        return float(y / x / UNIT)

    def learn(self, plan: Plan, seconds: float) -> None:
        """A step was computed in ``seconds``; what mixes prefills with decoding says little."""
        if not plan.tasks or plan.num_decode_tokens:
            return
        x = sum(self._geometry.flops(task.start, task.end) for task in plan.tasks) / UNIT
        self._sums = FADING * self._sums + (1, x, seconds, x * x, x * seconds)

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """See ``policies.protocol.FetchRule``."""
        each_s = self.seconds_per_operation
        if each_s is None:
            return position - cached_len  # The most is tried.
        rates = self._bytes_per_s()
        copy_s = 0.0
        for tier, size in num_bytes.items():
            rate = rates.get(tier)
            copy_s += size / rate if size and rate else 0.0
        return each_s * self._geometry.flops(cached_len, position) - copy_s


class AfterReading:
    """A ``FetchRule`` by which what is on disk costs nothing more."""

    def __init__(self, exchange: MeasuredExchange) -> None:
        self._exchange = exchange

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """See ``policies.protocol.FetchRule``."""
        rest = {tier: size for tier, size in num_bytes.items() if tier != DISK}
        return self._exchange.seconds_saved(cached_len, position, prompt_len, rest)
