"""Worth of host memory and disk for a trace, in GiB of device memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hybridcache.geometry.units import GIB
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import RunConfig
from hybridcache.lab.trace import Trace

NUM_SIZES = 8
"""Number of device sizes, from the present one to the sum of all tiers."""


@dataclass(frozen=True, slots=True)
class TierWorth:
    """``host_gib`` and ``disk_gib`` save as many seconds of prefill as ``device_gib`` more on the
    device would."""

    host_gib: float
    disk_gib: float
    device_gib: float
    alone: RunResult
    """Without them."""
    tiered: RunResult

    def text(self) -> str:
        """In a sentence."""
        sizes = ((self.host_gib, "host memory"), (self.disk_gib, "disk"))
        given = " and ".join(f"{gib:g} GiB of {word}" for gib, word in sizes if gib)
        before, after = self.alone, self.tiered
        total = before.seconds + before.seconds_saved
        shares = [100 * run.seconds_saved / total for run in (before, after)] if total else [0, 0]
        return (
            f"{given} are worth {self.device_gib:.3g} GiB on the device here: "
            f"token hit rate {100 * before.token_hit_rate:.1f} -> "
            f"{100 * after.token_hit_rate:.1f} %, "
            f"prefill seconds saved {shares[0]:.1f} -> {shares[1]:.1f} % (tokens far into a prompt "
            "cost more of these, and copies some)"
        )

    def as_record(self) -> dict[str, float]:
        """For JSON."""
        return {
            "host_gib": self.host_gib,
            "disk_gib": self.disk_gib,
            "device_gib": self.device_gib,
            "token_hit_rate": self.tiered.token_hit_rate,
            "seconds_saved_alone": self.alone.seconds_saved,
            "seconds_saved": self.tiered.seconds_saved,
        }


def tier_worth(
    trace: Trace,
    config: RunConfig,
    serving: Serving,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TierWorth:
    """Replay ``config``, which has lower tiers, and the same without them at increasing sizes of
    device memory.

    Saved seconds are interpolated linearly between the sizes, and never decrease. ``NUM_SIZES`` + 1
    runs. ValueError without a lower tier, or without a budget of bytes.
    """
    if config.budget_bytes is None or not (config.host_bytes or config.disk_bytes):
        raise ValueError("the worth of tiers needs a budget of bytes, and host memory or disk")
    most = config.budget_bytes + config.host_bytes + config.disk_bytes
    sizes = np.geomspace(config.budget_bytes, most, NUM_SIZES).astype(np.int64).tolist()
    alone = replace(config, host_bytes=0, disk_bytes=0)
    jobs = [Job(config, serving)]
    jobs += [Job(replace(alone, budget_bytes=size), serving) for size in sizes]
    tiered, *runs = run_sweep(trace, jobs, processes=processes, progress=progress)
    saved = np.maximum.accumulate([run.seconds_saved for run in runs])
    # Use the smallest of equal sizes: where the curve is flat, more memory has no worth.
    first = np.concatenate(([True], np.diff(saved) > 0))
    size = float(np.interp(tiered.seconds_saved, saved[first], np.array(sizes)[first]))
    return TierWorth(
        config.host_bytes / GIB,
        config.disk_bytes / GIB,
        (size - config.budget_bytes) / GIB,
        runs[0],
        tiered,
    )
