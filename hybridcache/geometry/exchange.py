"""Exchange rate between tiers: seconds of copying compared with seconds of prefill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from hybridcache.geometry.times import PrefillTimes, require_times
from hybridcache.tokens import require_index

PCIE_BYTES_PER_S = 50e9
"""One-way bandwidth of PCIe 5.0 x16 from pinned memory: 63 GB/s by its data sheet, less protocol
overhead."""
DISK_BYTES_PER_S = 6e9
"""Sequential read bandwidth of one NVMe drive of that generation."""
LATENCY_S = {"host": 20e-6, "disk": 200e-6}
"""Fixed latency of one copy, by tier."""


@dataclass(frozen=True)
class Exchange:
    """Copy times by tier and prefill times of a model on a machine. Implements ``FetchRule``."""

    times: PrefillTimes
    """Seconds of a prefill: any object with a method ``seconds(start, end)``, such as
    ``geometry.times.MeasuredTimes`` and ``Roofline``."""
    bytes_per_s: Mapping[str, float] = field(
        default_factory=lambda: {"host": PCIE_BYTES_PER_S, "disk": DISK_BYTES_PER_S}
    )
    """Bandwidth from each tier to the device: measured, or from data sheets."""
    latency_s: Mapping[str, float] = field(default_factory=lambda: dict(LATENCY_S))
    """Fixed time of one copy, by tier."""
    unit: int = 1
    """Tokens per id, for a cache that counts in units of several tokens."""

    def __post_init__(self) -> None:
        require_times(self.times)
        for name in ("bytes_per_s", "latency_s"):
            numbers = getattr(self, name)
            if not isinstance(numbers, Mapping):
                raise TypeError(f"{name} must be a number by tier, in a dict (got {numbers!r}).")
            for tier, value in numbers.items():
                is_number = isinstance(value, int | float) and tier in LATENCY_S
                if not is_number or not (value > 0 if name == "bytes_per_s" else 0 <= value < inf):
                    raise ValueError(
                        f"{name} must have positive numbers (a latency may be 0) for "
                        f"{' and '.join(LATENCY_S)} (got {value!r} for {tier!r})."
                    )
        require_index(self.unit, "unit", 1)

    def copy_seconds(self, num_bytes: Mapping[str, int]) -> float:
        """Return the seconds to copy these bytes to the device, one tier after the other.

        Raises:
            ValueError: a tier with bytes has no entry in ``bytes_per_s``.
        """
        if unknown := [tier for tier, size in num_bytes.items() if size] - self.bytes_per_s.keys():
            raise ValueError(f"bytes_per_s must have an entry for {', '.join(sorted(unknown))}.")
        return sum(
            self.latency_s.get(tier, 0.0) + size / self.bytes_per_s[tier]
            for tier, size in num_bytes.items()
            if size
        )

    def seconds_saved(
        self, cached_len: int, position: int, prompt_len: int, num_bytes: Mapping[str, int]
    ) -> float:
        """Return the seconds saved by a load; see ``FetchRule``."""
        unit, seconds = self.unit, self.times.seconds
        without = seconds(cached_len * unit, prompt_len * unit)
        return without - seconds(position * unit, prompt_len * unit) - self.copy_seconds(num_bytes)
