"""``engine serve --replicas``: the engines behind the server, and what it says of them."""

from __future__ import annotations

import os

from engine.config import ConfigError, EngineConfig
from engine.plugins.replicas.replicas_client import FleetEngine
from engine.plugins.replicas.start_replicas import FleetSize, start_fleet
from engine.server.config import ServerConfig


def start_replicas(
    config: EngineConfig, server: ServerConfig, address: str
) -> tuple[FleetEngine, str]:
    """(replicas that have loaded, the start screen). ConfigError: engines that have a role."""
    if config.role is not None:
        raise ConfigError(
            f"--replicas {server.replicas} and --role {config.role} can not go together: start one "
            "server a role, each without --replicas."
        )
    name = f"engine-{os.getpid()}"
    size = FleetSize(server.replicas, server.max_replicas, server.drain_s, server.ray)
    fleet = start_fleet(config, size, server.router, name)
    facts = fleet.facts
    number = str(server.replicas)
    if server.max_replicas is not None:
        number += f" to {server.max_replicas}"
    rows = [
        ("model", fleet.model_name),
        ("replicas", f"{number} on Ray Serve, a core each"),
        ("router", server.router),
        ("context", f"{facts.max_model_len:,} tokens"),
        ("memory", f"{facts.capacity_bytes / 2**20:,.0f} MiB each"),
        ("prefill", f"{facts.prefill_tokens_per_s:,.0f} tokens/s, measured"),
        ("address", address),
    ]
    return fleet, "\n".join(f"{name:<10}{value}" for name, value in rows)
