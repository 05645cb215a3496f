"""Prefix caching for hybrid LLMs: one radix tree over KV rows and state checkpoints. No torch.

Four groups of names:

- the cache: ``build_prefix_cache(CacheConfig(...))`` returns a ``PrefixCache``; a ``Lease`` is one
  running request's claim on it, and a ``StepPlan`` the work that follows for the tensors;
- the parts of a plan: ``Move``, ``Copy``, ``Drop`` and ``RowWrite``, carried out by your
  ``StepMemory``; and the rule that decides about loads from tiers: ``FetchRule``, or the ready-made
  ``Exchange``;
- policies: derive from ``ScorePolicy``, ``EvictionPolicy`` or ``PlacementPolicy``; a failure of
  one is a ``PolicyError``;
- the laboratory: ``simulate(open_trace(...))``, ``closed_loop``, ``optimum``, ``advise``.

The laboratory and the policies are imported when they are first used. All other names are imported
from their modules. A cache is not thread-safe: one thread calls it, or callers share a lock. A
public name is deprecated, with a warning, for one minor release before it is removed.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hybridcache.allocators.moves import Copy, Drop, Move, RowWrite, StepMemory, StepPlan
from hybridcache.api import CacheStats, Losses, PrefixCache, PrefixMatch
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.hybrid import HybridRadixCache
from hybridcache.lease import Lease, LeaseRequest

if TYPE_CHECKING:
    from hybridcache.geometry.exchange import Exchange
    from hybridcache.geometry.model import ModelGeometry
    from hybridcache.geometry.times import PrefillTimes
    from hybridcache.lab.advise import advise
    from hybridcache.lab.simulation.closed_loop import closed_loop
    from hybridcache.lab.simulation.simulate import optimum, simulate
    from hybridcache.lab.trace import Trace, TraceRequest
    from hybridcache.lab.traces import open_trace
    from hybridcache.policies.admission.base import AdmissionPolicy
    from hybridcache.policies.eviction.scored import ScorePolicy
    from hybridcache.policies.protocol import (
        EvictionPolicy,
        FetchRule,
        Item,
        Placed,
        PlacementPolicy,
        PolicyError,
        Prefill,
    )
    from hybridcache.policies.registry import parse_placement

_LAZY = {
    "Exchange": "geometry.exchange",
    "PrefillTimes": "geometry.times",
    "ModelGeometry": "geometry.model",
    "advise": "lab.advise",
    "closed_loop": "lab.simulation.closed_loop",
    "optimum": "lab.simulation.simulate",
    "simulate": "lab.simulation.simulate",
    "Trace": "lab.trace",
    "TraceRequest": "lab.trace",
    "open_trace": "lab.traces",
    "AdmissionPolicy": "policies.admission.base",
    "ScorePolicy": "policies.eviction.scored",
    "EvictionPolicy": "policies.protocol",
    "FetchRule": "policies.protocol",
    "Item": "policies.protocol",
    "Placed": "policies.protocol",
    "PlacementPolicy": "policies.protocol",
    "PolicyError": "policies.protocol",
    "Prefill": "policies.protocol",
    "parse_placement": "policies.registry",
}
"""Modules of the public names that are imported at first use."""

_MOVED = {
    "Advice": "lab.advise",
    "BASELINES": "lab.baselines",
    "Baseline": "lab.baselines",
    "BaselineConfig": "lab.baselines",
    "EVICTION": "policies.registry",
    "GENERATORS": "lab.generators",
    "InfiniteCache": "lab.infinite",
    "Job": "lab.simulation.sweep",
    "LeaseLog": "export.lease_log",
    "LeaseTarget": "lab.simulation.target",
    "METRICS": "lab.report",
    "MeasuredTimes": "geometry.times",
    "NullCache": "variants",
    "Pauses": "lab.arrivals",
    "Poisson": "lab.arrivals",
    "RadixCache": "variants",
    "Roofline": "geometry.times",
    "RunConfig": "lab.simulation.target",
    "RunResult": "lab.simulation.result",
    "SampledPolicy": "policies.eviction.scored",
    "Serving": "lab.simulation.serving",
    "SimulationResult": "lab.simulation.simulate",
    "Sweep": "lab.simulation.simulate",
    "Tokens": "tokens",
    "build_target": "lab.simulation.target",
    "interleave": "lab.arrivals",
    "make_eviction": "policies.registry",
    "run_sweep": "lab.simulation.sweep",
    "serve": "lab.simulation.serving",
    "sizes": "lab.simulation.sizes",
}
"""Names that were public in 0.1, with their modules; removed in 0.3."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from hybridcache.lab.extras import version

        return version()
    module = _LAZY.get(name) or _MOVED.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MOVED:
        warnings.warn(
            f"hybridcache.{name} is deprecated: import it from hybridcache.{module}",
            DeprecationWarning,
            stacklevel=2,
        )
    found = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "AdmissionPolicy",
    "CacheConfig",
    "CacheStats",
    "Copy",
    "Drop",
    "EvictionPolicy",
    "Exchange",
    "FetchRule",
    "HybridRadixCache",
    "Item",
    "Lease",
    "LeaseRequest",
    "Losses",
    "ModelGeometry",
    "Move",
    "Placed",
    "PlacementPolicy",
    "PolicyError",
    "Prefill",
    "PrefillTimes",
    "PrefixCache",
    "PrefixMatch",
    "RowWrite",
    "ScorePolicy",
    "StepMemory",
    "StepPlan",
    "Trace",
    "TraceRequest",
    "advise",
    "build_prefix_cache",
    "closed_loop",
    "open_trace",
    "optimum",
    "parse_placement",
    "simulate",
]
