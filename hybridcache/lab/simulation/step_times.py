"""Times of an engine's steps: from a roofline, or from a measured table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hybridcache.geometry.times import MeasuredTimes, Roofline, interpolated, locate


class StepTimes(Protocol):
    """Seconds of one step of an engine."""

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        """Return the seconds of a step: ``prefills`` are token ranges [start, end), and
        ``num_decodes`` requests of ``context`` tokens together decode one token each."""
        ...


@dataclass(frozen=True, slots=True)
class RooflineSteps:
    """Step times from first principles: all tokens of a step share one read of the weights."""

    roofline: Roofline

    def describe(self) -> str:
        """Describe the assumed machine in one line."""
        return self.roofline.describe().replace("a prefill", "a step")

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        machine, geometry = self.roofline, self.roofline.geometry
        num_tokens, num_rows = num_decodes, context
        flops = num_decodes * geometry.flops_per_token
        flops += context * geometry.attention_flops_per_pair
        for start, end in prefills:
            num_tokens += end - start
            num_rows += end
            flops += geometry.flops(start, end)
        params = min(geometry.total_params, geometry.active_params * num_tokens)
        moved = params * machine.weight_bytes_per_param + num_rows * geometry.kv_bytes_per_token
        moved += 2 * geometry.state_bytes * num_decodes
        slower = max(flops / machine.flops_per_s, moved / machine.bytes_per_s)
        return machine.overhead_s + slower / machine.devices


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """Step times from a measured table: the sum over prefills and decodes, with the fixed cost,
    that of a decode step of no request, counted once."""

    table: MeasuredTimes

    def __post_init__(self) -> None:
        if not self.table.decodes:
            raise ValueError(
                f"{self.table.source} has no times of decode steps: measure it again with "
                "experiments.benchmarks.measure_prefill of a checkout, or add them"
            )

    def describe(self) -> str:
        """Describe the source in one line."""
        return self.table.describe()

    def _decode_s(self, num_decodes: int) -> float:
        place = locate(self.table.decodes, num_decodes)
        return max(0.0, interpolated(self.table.decode_s, place))

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        """See ``StepTimes``. Decode steps were measured at one ``context``, so it has no effect."""
        fixed_s = max(0.0, self._decode_s(0))
        seconds = sum(self.table.seconds(start, end) - fixed_s for start, end in prefills)
        if num_decodes:
            seconds += self._decode_s(num_decodes) - fixed_s
        return fixed_s + max(0.0, seconds)
