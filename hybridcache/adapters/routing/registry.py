"""Router registry: built-in routers by name, and user routers as ``module:Class``."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from hybridcache.adapters.routing.precise import CheckpointSeconds
from hybridcache.adapters.routing.protocol import LeastLoaded, ReplicaSpec, Router
from hybridcache.adapters.routing.text import CacheAware
from hybridcache.policies.user import load

ROUTERS: dict[str, type[Router]] = {
    "checkpoint": CheckpointSeconds,
    "text": CacheAware,
    "least_loaded": LeastLoaded,
}


def find_router(router: str | type[Router]) -> Callable[[ReplicaSpec], Router]:
    """Return the factory of a router: a name, ``module:Class``, or a class derived from ``Router``.
    Raises ValueError if it is none of them."""
    if isinstance(router, type) and issubclass(router, Router):
        return router
    if isinstance(router, str) and router in ROUTERS:
        return ROUTERS[router]
    if isinstance(router, str) and ":" in router:
        return cast(Callable[[ReplicaSpec], Router], load(router, Router).make)
    known = f"one of {', '.join(ROUTERS)}, module:Class, or a class derived from Router"
    raise ValueError(f"router must be {known} (got {router!r}).")
