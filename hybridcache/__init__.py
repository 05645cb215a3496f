"""Prefix caching for hybrid LLMs: one radix tree over KV rows and state checkpoints. No torch.

The front door. The cache is here at once: start with ``build_prefix_cache(CacheConfig(...))``;
``PrefixCache`` says what the verbs do, ``interface`` who owns which index. The laboratory
(``simulate``, ``open_trace``, ``optimum``, ``advise``, ...) is imported when it is first asked for,
and so is what a policy of your own is made from.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hybridcache.api import Losses, PrefixCache, PrefixMatch
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.hybrid import HybridRadixCache
from hybridcache.lease import Lease, LeaseLog, LeaseRequest
from hybridcache.tokens import Tokens
from hybridcache.variants import NullCache, RadixCache

if TYPE_CHECKING:
    from hybridcache.geometry.model import ModelGeometry
    from hybridcache.geometry.times import MeasuredTimes, Roofline
    from hybridcache.lab.advise import Advice, advise
    from hybridcache.lab.arrivals import Pauses, Poisson, interleave
    from hybridcache.lab.baselines import BASELINES, Baseline, BaselineConfig
    from hybridcache.lab.generators import GENERATORS
    from hybridcache.lab.infinite import InfiniteCache
    from hybridcache.lab.optimum import optimum
    from hybridcache.lab.report import METRICS
    from hybridcache.lab.simulation.result import RunResult
    from hybridcache.lab.simulation.serving import Serving, serve
    from hybridcache.lab.simulation.simulate import SimulationResult, Sweep, simulate
    from hybridcache.lab.simulation.sizes import sizes
    from hybridcache.lab.simulation.sweep import Job, run_sweep
    from hybridcache.lab.simulation.target import LeaseTarget, RunConfig, build_target
    from hybridcache.lab.trace import Trace, TraceRequest
    from hybridcache.lab.traces import open_trace
    from hybridcache.policies.admission.base import AdmissionPolicy
    from hybridcache.policies.eviction.scored import SampledPolicy, ScorePolicy
    from hybridcache.policies.protocol import (
        EvictionPolicy,
        Item,
        Placed,
        PlacementPolicy,
        Prefill,
    )
    from hybridcache.policies.words import EVICTION, make_eviction, parse_placement

_LAZY = {
    "geometry.model": ("ModelGeometry",),
    "geometry.times": (
        "MeasuredTimes",
        "Roofline",
    ),
    "lab.advise": (
        "Advice",
        "advise",
    ),
    "lab.arrivals": (
        "Pauses",
        "Poisson",
        "interleave",
    ),
    "lab.baselines": (
        "BASELINES",
        "Baseline",
        "BaselineConfig",
    ),
    "lab.generators": ("GENERATORS",),
    "lab.infinite": ("InfiniteCache",),
    "lab.optimum": ("optimum",),
    "lab.report": ("METRICS",),
    "lab.simulation.result": ("RunResult",),
    "lab.simulation.serving": (
        "Serving",
        "serve",
    ),
    "lab.simulation.simulate": (
        "SimulationResult",
        "Sweep",
        "simulate",
    ),
    "lab.simulation.sizes": ("sizes",),
    "lab.simulation.sweep": (
        "Job",
        "run_sweep",
    ),
    "lab.simulation.target": (
        "LeaseTarget",
        "RunConfig",
        "build_target",
    ),
    "lab.trace": (
        "Trace",
        "TraceRequest",
    ),
    "lab.traces": ("open_trace",),
    "policies.admission.base": ("AdmissionPolicy",),
    "policies.eviction.scored": (
        "SampledPolicy",
        "ScorePolicy",
    ),
    "policies.words": (
        "EVICTION",
        "make_eviction",
        "parse_placement",
    ),
    "policies.protocol": (
        "EvictionPolicy",
        "Item",
        "Placed",
        "PlacementPolicy",
        "Prefill",
    ),
}
"""Modules that are imported when one of their names is first asked for."""

_HOME = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


__all__ = [
    "BASELINES",
    "EVICTION",
    "GENERATORS",
    "METRICS",
    "AdmissionPolicy",
    "Advice",
    "Baseline",
    "BaselineConfig",
    "CacheConfig",
    "EvictionPolicy",
    "HybridRadixCache",
    "InfiniteCache",
    "Item",
    "Job",
    "Lease",
    "LeaseLog",
    "LeaseRequest",
    "LeaseTarget",
    "Losses",
    "MeasuredTimes",
    "ModelGeometry",
    "NullCache",
    "Pauses",
    "Placed",
    "PlacementPolicy",
    "Poisson",
    "Prefill",
    "PrefixCache",
    "PrefixMatch",
    "RadixCache",
    "Roofline",
    "RunConfig",
    "RunResult",
    "SampledPolicy",
    "ScorePolicy",
    "Serving",
    "SimulationResult",
    "Sweep",
    "Tokens",
    "Trace",
    "TraceRequest",
    "advise",
    "build_prefix_cache",
    "build_target",
    "interleave",
    "make_eviction",
    "open_trace",
    "optimum",
    "parse_placement",
    "run_sweep",
    "serve",
    "simulate",
    "sizes",
]
