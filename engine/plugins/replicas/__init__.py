"""Several engines behind one server, on Ray. Each request goes to a replica that has much of
its prompt in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from engine.config import COUNT, ConfigError, PluginConfig, check_fields

ROUTER = "checkpoint"
"""Default of ``ReplicasConfig.router``."""


@dataclass(frozen=True, slots=True)
class ReplicasConfig(PluginConfig):
    """Number of engines, and the policy that chooses one."""

    plugin: ClassVar[str] = "replicas"
    title: ClassVar[str] = "replicas"

    replicas: Annotated[int, COUNT] = 1
    """Number of engines on Ray, with one core each, and one GPU if Ray has enough, behind one
    router."""
    ray: str | None = None
    """With replicas: address of their Ray cluster (auto: the one that ray start created here); by
    default a new one on this machine."""
    router: str | None = None
    """With replicas: policy that chooses one for a request: checkpoint (default), text,
    least_loaded, or module:Class."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.is_used and (self.ray, self.router) != (None, None):
            raise ConfigError("--router and --ray need --replicas (2 or more).")

    @property
    def is_used(self) -> bool:
        """See ``PluginConfig``: a router is in front of several engines."""
        return self.replicas > 1
