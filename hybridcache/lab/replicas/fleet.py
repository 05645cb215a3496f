"""Description of a simulated fleet: number and speed of replicas, router, and failures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import PrefillTimes
from hybridcache.lab.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Prefill times proportional to FLOPs, as on a server with large batches, where the cost of
    reading weights is shared."""

    geometry: ModelGeometry
    flops_per_s: float

    def seconds(self, start: int, end: int) -> float:
        if end <= start:
            return 0.0
        return self.geometry.flops(start, end) / self.flops_per_s


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """Replicas and their router."""

    replicas: int = 8
    router: str = "checkpoint"
    """A word of ``ROUTERS``, or ``module:Class``."""
    load: float | None = None
    """Share of the trace's time that all prompts, computed cold, would keep the replicas busy. It
    sets their speed; None keeps the prefill times."""
    delay_s: float = 0.0
    """Seconds from a change in a cache until its event reaches the router."""
    failures: int = 0
    """Number of replicas that fail, evenly over the trace; each is replaced by an empty one."""
    replaced_s: float = 30.0
    """Until the one that replaces it is up."""
    tpot_s: float = 0.02
    """Seconds an answer token takes; decoding delays no prefill."""
    seed: int = 0
    """Number of the replica that fails first."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {self.replicas}")
        if self.load is not None and not self.load > 0:
            raise ValueError(f"load must be above 0, got {self.load}")
        if self.delay_s < 0 or self.replaced_s < 0 or self.tpot_s < 0:
            raise ValueError("delay_s, replaced_s and tpot_s must be at least 0")
        if self.failures < 0:
            raise ValueError(f"failures must be at least 0, got {self.failures}")


@dataclass(frozen=True, slots=True)
class Span:
    """Total work of a trace."""

    first_s: float
    last_s: float
    cold_flops: int
    """FLOPs of computing every prompt from its first token."""
    requests: int

    @classmethod
    def of(cls, requests: Iterable[TraceRequest], unit: int, geometry: ModelGeometry) -> Span:
        """Add up the work of ``requests``. O(requests). ValueError if there is none."""
        first_s = last_s = 0.0
        flops = count = 0
        for request in requests:
            if not count:
                first_s = request.timestamp_s
            last_s = request.timestamp_s
            flops += geometry.flops(0, request.num_tokens(unit))
            count += 1
        if not count:
            raise ValueError("there is no request in the trace")
        return cls(first_s, last_s, flops, count)

    @property
    def seconds(self) -> float:
        return self.last_s - self.first_s


def times_of(
    config: FleetConfig, span: Span, geometry: ModelGeometry, times: PrefillTimes
) -> PrefillTimes:
    """Return ``times``, or with a load the times that keep the replicas that busy. ValueError for
    a load of a trace that takes no time."""
    if config.load is None:
        return times
    if span.seconds <= 0:
        raise ValueError(
            "load is a share of the trace's time, and all its requests come at once: name starts "
            "(starts=poisson:2), or leave the load out"
        )
    return Arithmetic(geometry, span.cold_flops / (config.load * config.replicas * span.seconds))
