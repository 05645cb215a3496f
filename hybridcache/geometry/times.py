"""Times of prefills and steps, computed from a roofline or interpolated in a measured table."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from hybridcache.geometry.model import ModelGeometry


class StepTimes(Protocol):
    """Seconds of one step of an engine."""

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        """Return the seconds of a step: ``prefills`` are token ranges [start, end), and
        ``num_decodes`` requests of ``context`` tokens together decode one token each."""
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """Times as the slower of arithmetic and memory traffic, plus a constant. All tokens of a step
    share one read of the weights.

    The defaults are the data sheet of one H100 SXM (989 TFLOP/s dense bf16, 3.35 TB/s) at half its
    peak arithmetic. The work is divided evenly over ``devices``.
    """

    geometry: ModelGeometry
    devices: int = 1
    flops_per_s: float = 989e12 * 0.5
    bytes_per_s: float = 3.35e12
    overhead_s: float = 0.005
    """Seconds added to each prefill or step: launches, sampling and scheduling."""
    weight_bytes_per_param: float = 2

    def describe(self) -> str:
        tera, tera_bytes = self.flops_per_s / 1e12, self.bytes_per_s / 1e12
        overhead = f"{1e3 * self.overhead_s:.3g} ms a prefill"
        numbers = f"{tera:.4g} TFLOP/s and {tera_bytes:.3g} TB/s each, {overhead}"
        is_default = (self.flops_per_s, self.bytes_per_s) == (989e12 * 0.5, 3.35e12)
        machine = f"{self.devices} x H100 SXM" if is_default else f"{self.devices} devices"
        return f"a roofline of {machine}: {numbers}"

    @classmethod
    def fitting(cls, geometry: ModelGeometry, device_bytes: float = 60e9) -> Roofline:
        """Assume the fewest devices (a power of two) that hold the model's weights in bf16, each
        with ``device_bytes`` for weights."""
        devices = 1
        while devices * device_bytes < 2 * geometry.total_params:
            devices *= 2
        return cls(geometry, devices)

    def seconds(self, start: int, end: int) -> float:
        if end <= start:
            return 0.0
        geometry = self.geometry
        # Each token selects its own experts: a short prefill reads few of them, a long one all.
        used, total = geometry.active_params * (end - start), geometry.total_params
        moved = (used if used < total else total) * self.weight_bytes_per_param
        moved += end * geometry.kv_bytes_per_token
        arithmetic = geometry.flops(start, end) / self.flops_per_s
        return self.overhead_s + max(arithmetic, moved / self.bytes_per_s) / self.devices

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        geometry, num_tokens, num_rows = self.geometry, num_decodes, context
        flops = num_decodes * geometry.flops_per_token
        flops += context * geometry.attention_flops_per_pair
        for start, end in prefills:
            num_tokens += end - start
            num_rows += end
            flops += geometry.flops(start, end)
        params = min(geometry.total_params, geometry.active_params * num_tokens)
        moved = params * self.weight_bytes_per_param + num_rows * geometry.kv_bytes_per_token
        moved += 2 * geometry.state_bytes * num_decodes
        slower = max(flops / self.flops_per_s, moved / self.bytes_per_s)
        return self.overhead_s + slower / self.devices


@dataclass(frozen=True, slots=True)
class MeasuredTimes:
    """Prefill times from a table t(start, length), bilinear in it and linear beyond."""

    starts: tuple[int, ...]
    """Numbers of reused tokens, ascending from 0."""
    lengths: tuple[int, ...]
    """Numbers of computed tokens, ascending."""
    table_s: tuple[tuple[float, ...], ...]
    """``table_s[i][j]`` is the time of ``lengths[j]`` tokens after ``starts[i]`` reused ones."""
    source: str = "a table"
    """Path of the file with the table."""
    decodes: tuple[int, ...] = ()
    """Numbers of requests that decode in one step, ascending. Empty if not measured."""
    decode_s: tuple[float, ...] = ()
    """Seconds of a step with that many decodes."""

    def __post_init__(self) -> None:
        for name in ("starts", "lengths", "decodes"):
            axis = getattr(self, name)
            if list(axis) != sorted(set(axis)):
                raise ValueError(f"{name} must ascend (got {axis}).")
        if self.starts[:1] != (0,):
            raise ValueError(f"starts must begin with 0 (got {self.starts}).")
        shape = len(self.starts), {len(self.lengths)}, len(self.decodes)
        if shape != (len(self.table_s), {len(row) for row in self.table_s}, len(self.decode_s)):
            raise ValueError(
                "table_s must have one row per start and one number per length, and decode_s one "
                "number per decode."
            )
        for one in (*chain(*self.table_s), *self.decode_s):
            if not 0 <= one < math.inf:
                raise ValueError(f"table_s and decode_s must be seconds of 0 or more (got {one}).")
        for start, row in zip(self.starts, self.table_s, strict=True):
            if list(row) != sorted(row):
                raise ValueError(
                    f"table_s must not fall along lengths, as it does after {start} tokens: it was "
                    "measured on a busy machine, or too few times."
                )

    def describe(self) -> str:
        return f"measured, {self.source}, to {self.lengths[-1]:,} tokens and linear beyond"

    @classmethod
    def of(cls, record: Mapping[str, Any], source: str) -> MeasuredTimes:
        """Return the table of a record, whose names are those of the fields."""
        axes = tuple(record["starts"]), tuple(record["lengths"])
        steps = (tuple(record.get(name, ())) for name in ("decodes", "decode_s"))
        return cls(*axes, tuple(map(tuple, record["table_s"])), source, *steps)

    @classmethod
    def load(cls, path: str | Path) -> MeasuredTimes:
        """Read JSON of the form {"starts": [...], "lengths": [...], "table_s": [[...], ...]}.

        Raises ValueError with the path if the file has another form.
        """
        try:
            return cls.of(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a table of prefill times: {error}") from error

    def seconds(self, start: int, end: int) -> float:
        if end <= start:
            return 0.0
        column = locate(self.lengths, end - start)
        by_start = [interpolated(row, column) for row in self.table_s]
        return max(interpolated(by_start, locate(self.starts, start)), 0.0)

    def _decode_seconds(self, num_decodes: int) -> float:
        return max(0.0, interpolated(self.decode_s, locate(self.decodes, num_decodes)))

    def step_seconds(
        self, prefills: Sequence[tuple[int, int]], num_decodes: int, context: int
    ) -> float:
        """See ``StepTimes``: the sum over prefills and decodes, with the fixed cost, that of a
        decode step of no request, counted once. Decode steps were measured at one ``context``, so
        it has no effect."""
        fixed_s = self._decode_seconds(0)
        seconds = sum(self.seconds(start, end) - fixed_s for start, end in prefills)
        if num_decodes:
            seconds += self._decode_seconds(num_decodes) - fixed_s
        return fixed_s + max(0.0, seconds)


def locate(knots: Sequence[int], value: int) -> tuple[int, float]:
    """Return the index of the interval to interpolate in, and the position of ``value`` along it,
    below 0 or above 1 outside all knots."""
    if len(knots) == 1:
        return 0, 0.0
    index = min(max(bisect_right(knots, value) - 1, 0), len(knots) - 2)
    return index, (value - knots[index]) / (knots[index + 1] - knots[index])


def interpolated(values: Sequence[float], place: tuple[int, float]) -> float:
    """Return the value at ``place``, as ``locate`` returns it."""
    index, part = place
    return values[index] + part * (values[min(index + 1, len(values) - 1)] - values[index])
