"""Engines behind one server, on Ray Serve: requests go where most of their prefix is cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import PluginConfig, setting


@dataclass(frozen=True, slots=True)
class ReplicasConfig(PluginConfig):
    """Number of engines, and the choice between them."""

    plugin: ClassVar[str] = "replicas"
    title: ClassVar[str] = "replicas"

    replicas: int = setting(1, "so many engines on Ray Serve, a core each, behind one router")
    max_replicas: int | None = setting(
        None,
        "under load up to so many engines on Ray Serve; one that is not needed any more finishes "
        "what it computes, and goes; default: as many as --replicas, always",
    )
    ray: str | None = setting(
        None,
        "with replicas: address of the Ray cluster they run on (auto: the one that ray start made "
        "here); default: one of its own on this machine",
    )
    router: str = setting(
        "checkpoint",
        "with replicas: which one a request goes to: checkpoint, kv, text, session, least_loaded, "
        "round_robin, module:Class",
    )

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"--replicas {self.replicas} must be 1 or more.")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"--max-replicas {self.max_replicas} must not be below --replicas {self.replicas}."
            )

    @property
    def is_used(self) -> bool:
        """See ``PluginConfig``: a router is in front of engines of Ray Serve."""
        return self.replicas > 1 or self.max_replicas is not None
