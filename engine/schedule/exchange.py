"""Fetch or compute again: seconds of copy against seconds of prefill, both as they were measured
here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.schedule.plan import Plan
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline

FADING = 0.95
"""What a step knows counts for so much less after the next."""


class MeasuredExchange:
    """A ``FetchRule`` that learns while the engine serves.

    How a prefill's time grows with its length is the model's geometry (its operations and bytes);
    how fast this machine is, is what its own prefills took. What is not measured yet is taken to be
    worth trying.
    """

    def __init__(
        self, geometry: ModelGeometry, bytes_per_s: Callable[[], Mapping[str, float | None]]
    ) -> None:
        """``bytes_per_s``: from each tier to the device, as measured so far; 0: nothing can be
        fetched from there any more."""
        self._shape = Roofline(geometry, overhead_s=0.0)
        self._bytes_per_s = bytes_per_s
        self._measured_s = self._expected_s = 0.0

    @property
    def slowness(self) -> float | None:
        """Seconds that prefills take here for one of the data sheet's; None: there was none."""
        return self._measured_s / self._expected_s if self._expected_s else None

    def learn(self, plan: Plan, seconds: float) -> None:
        """A step was computed in ``seconds``; what mixes prefills with decoding says little."""
        if not plan.tasks or plan.num_decode_tokens:
            return
        expected = sum(self._shape.seconds(task.start, task.end) for task in plan.tasks)
        self._measured_s = FADING * self._measured_s + seconds
        self._expected_s = FADING * self._expected_s + expected

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """See ``policies.protocol.FetchRule``."""
        rates = self._bytes_per_s()
        copy_s = 0.0
        for tier, size in num_bytes.items():
            rate = rates.get(tier)
            if size and rate == 0:
                return -1.0
            copy_s += size / rate if size and rate else 0.0
        seconds = self._shape.seconds
        computed_s = seconds(cached_len, prompt_len) - seconds(position, prompt_len)
        slowness = self.slowness
        # Nothing was computed here yet: what is longer is worth more, and all of it is tried.
        return position - cached_len if slowness is None else slowness * computed_s - copy_s
