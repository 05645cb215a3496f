"""Router registry: built-in routers by name, and user routers as ``module:Class``."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from hybridcache.policies.user import load
from hybridcache.routing.precise import CheckpointSeconds
from hybridcache.routing.protocol import LeastLoaded, ReplicaSpec, Router
from hybridcache.routing.text_tree import CacheAware

ROUTERS: dict[str, type[Router]] = {
    "checkpoint": CheckpointSeconds,
    "text": CacheAware,
    "least_loaded": LeastLoaded,
}


def find_router(name: str) -> Callable[[ReplicaSpec], Router]:
    """Return the factory of the router that ``name`` names. Raises ValueError if there is none."""
    if name in ROUTERS:
        return ROUTERS[name]
    if ":" not in name:
        raise ValueError(
            f"router must be one of {', '.join(ROUTERS)}, or module:Class (got {name!r})."
        )
    return cast(Callable[[ReplicaSpec], Router], load(name, Router).make)
