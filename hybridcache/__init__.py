"""Prefix caching for hybrid LLMs: one radix tree over KV rows and state checkpoints. No torch.

Three groups of names:

- the cache: ``build_prefix_cache(CacheConfig(...))`` returns a ``HybridRadixCache``; a ``Lease`` is
  one running request's claim on it, and a ``StepPlan`` the work that follows for the tensors;
- policies: derive from ``ScorePolicy``, ``EvictionPolicy`` or ``PlacementPolicy``;
- the laboratory: ``simulate(open_trace(...))``, ``closed_loop``, ``optimum``.

The laboratory and model sizes are imported when they are first used. All other names are imported
from their modules. A cache is not thread-safe: one thread calls it, or callers share a lock.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from hybridcache.allocators.moves import StepPlan
from hybridcache.command.field_texts import describe_fields
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.registry import parse_placement
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import EvictionPolicy, Item, Placed, PlacementPolicy, Prefill

if TYPE_CHECKING:
    from hybridcache.geometry.model import ModelGeometry
    from hybridcache.lab.runs.closed_loop import closed_loop
    from hybridcache.lab.runs.simulate import optimum, simulate
    from hybridcache.lab.traces import open_trace
    from hybridcache.lab.traces.trace import Trace, TraceRequest

_LAZY = {
    "ModelGeometry": "geometry.model",
    "closed_loop": "lab.runs.closed_loop",
    "optimum": "lab.runs.simulate",
    "simulate": "lab.runs.simulate",
    "Trace": "lab.traces.trace",
    "TraceRequest": "lab.traces.trace",
    "open_trace": "lab.traces",
}
"""Modules of the public names that are imported at first use."""


def __getattr__(name: str) -> object:
    if name == "__version__":
        from hybridcache.command.extras import version

        return version()
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = found
    describe_fields(__name__)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "CacheConfig",
    "EvictionPolicy",
    "HybridRadixCache",
    "Item",
    "Lease",
    "LeaseRequest",
    "ModelGeometry",
    "Placed",
    "PlacementPolicy",
    "Prefill",
    "ScorePolicy",
    "StepPlan",
    "Trace",
    "TraceRequest",
    "build_prefix_cache",
    "closed_loop",
    "open_trace",
    "optimum",
    "parse_placement",
    "simulate",
]

describe_fields(__name__)
