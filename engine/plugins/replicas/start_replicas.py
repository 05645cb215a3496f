"""Starting replicas on Ray Serve, and the server's view of them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import BUILTIN_NAME, ConfigError, EngineConfig
from engine.hub import resolve_config
from engine.plugins.replicas import ReplicasConfig
from engine.plugins.replicas.fleet import FLEETS, Fleet
from engine.plugins.replicas.replica_output import Order, ReplicaFacts
from engine.plugins.replicas.replicas_client import FleetEngine
from engine.server.config import ServerConfig
from hybridcache.policies.registry import parse_placement
from hybridcache.routing.protocol import ReplicaSpec, Router
from hybridcache.routing.registry import find_router


def start_replicas(
    config: EngineConfig, server: ServerConfig, address: str
) -> tuple[FleetEngine, str]:
    """Return (replicas that have loaded, the start screen). Raises ConfigError for settings of an
    engine that replicas do not support."""
    settings = server.of(ReplicasConfig)
    if config.uses("disaggregation"):
        raise ConfigError(
            f"--replicas {settings.replicas} and --role cannot go together: start one server for "
            "each role, without --replicas."
        )
    if config.uses("observe"):
        raise ConfigError(
            "--trace writes the steps of one engine: leave --replicas and --max-replicas out."
        )
    config = resolve_config(config)
    name = f"engine-{os.getpid()}"
    size = FleetSize(settings.replicas, settings.max_replicas, server.drain_s, settings.ray)
    fleet = start_fleet(config, size, settings.router, name)
    facts = fleet.facts
    number = str(settings.replicas)
    if settings.max_replicas is not None:
        number += f" to {settings.max_replicas}"
    rows = [
        ("model", fleet.model_name),
        ("replicas", f"{number} on Ray Serve, a core each"),
        ("router", settings.router),
        ("context", f"{facts.max_model_len:,} tokens"),
        ("memory", f"{facts.capacity_bytes / 2**20:,.0f} MiB each"),
        ("prefill", f"{facts.prefill_tokens_per_s:,.0f} tokens/s, measured"),
        ("address", address),
    ]
    return fleet, "\n".join(f"{name:<10}{value}" for name, value in rows)


START_S = 600.0
"""How long replicas may take to load their models."""
BESIDE_REQUESTS = 64
"""Calls that a replica may have beside requests: its events, reports."""
TARGET_SHARE = 0.75
"""Of what a replica runs at once: more on average is work for another one."""
UPSCALE_S, DOWNSCALE_S = 10.0, 120.0
"""For how long there must be too much to do, or too little, before a replica comes or goes."""
LOOK_BACK_S = 15.0
"""Over which it is averaged; Ray Serve counts every ten seconds."""


class PerToken:
    """A constant rate, measured by a replica when it started."""

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s = tokens_per_s

    def seconds(self, start: int, end: int) -> float:
        """To compute tokens [start, end)."""
        return max(end - start, 0) / self._tokens_per_s


@dataclass(frozen=True, slots=True)
class FleetSize:
    """How many engines."""

    num_replicas: int
    max_replicas: int | None = None
    """Under load; None: no more."""
    drain_s: float = 30.0
    """How long one that is not needed any more may take to finish what it computes."""
    ray: str | None = None
    """Address of a cluster; None: one of its own on this machine."""


def start_fleet(config: EngineConfig, size: FleetSize, router: str, name: str) -> FleetEngine:
    """Engines of ``config``, a core each, on a Ray cluster. ``name`` tells fleets of one cluster
    apart. ValueError: a router or a cluster that does not exist, or too few cores. Waits until all
    have loaded."""
    make = find_router(router)
    if config.num_ranks > 1:
        raise ValueError(
            "--replicas are engines of one process each: leave out --tp "
            f"{config.num_ranks}, or serve one engine."
        )
    import ray
    from ray import serve

    from engine.plugins.replicas.ray_router import FleetRequestRouter
    from engine.plugins.replicas.replica import EngineReplica

    is_ours = _join_ray(size.ray)
    num_cores = int(ray.cluster_resources().get("CPU", 0))
    if num_cores < size.num_replicas:
        if is_ours:
            ray.shutdown()
        raise ValueError(
            f"--replicas {size.num_replicas} want a core each, and Ray has {num_cores} here: "
            "lower it, or name a larger cluster with --ray."
        )
    found: list[FleetEngine] = []
    facts: list[ReplicaFacts] = []

    def make_router() -> Router:
        return make(spec_of(facts[0], config))

    def on_change() -> None:
        if found:
            found[0].members_changed()

    fleet = FLEETS[name] = Fleet(make_router, on_change)

    def shut_down() -> None:
        FLEETS.pop(name, None)
        serve.delete(name)
        if is_ours:
            serve.shutdown()
            ray.shutdown()

    try:
        handle = _run(serve, EngineReplica, FleetRequestRouter, config, size, name)
        facts.append(handle.options(method_name="facts").remote(Order()).result(timeout_s=START_S))
        fleet.begin()
    except BaseException:
        shut_down()
        raise
    model = Path(config.model).resolve().name if config.model else BUILTIN_NAME
    found.append(FleetEngine(config, handle, fleet, facts[0], model, shut_down, is_death))
    return found[0]


def _join_ray(address: str | None) -> bool:
    """Join a cluster, or start one; whether it was started. ValueError: there is none."""
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        ray.init(address="local", include_dashboard=False, **quiet)
        return True
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ValueError(
            f"--ray {address}: no cluster answers there: start one with `ray start --head`, or "
            "leave --ray out."
        ) from error
    return False


def _run(
    serve: Any, replica: Any, router: Any, config: EngineConfig, size: FleetSize, name: str
) -> Any:
    """Deploy, without Ray's own HTTP server: ours is in front."""
    from ray.serve.config import RequestRouterConfig

    serve.start(proxy_location="Disabled")
    threads = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_paths())}}
    deployment = serve.deployment(
        **_number(size, config),
        max_ongoing_requests=config.max_queue + config.max_running + BESIDE_REQUESTS,
        ray_actor_options={"num_cpus": 1, "runtime_env": threads},
        request_router_config=RequestRouterConfig(
            request_router_class=router, request_router_kwargs={"fleet": name}
        ),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=size.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
    )(replica)
    return serve.run(deployment.bind(config), name=name, route_prefix=None)


def _number(size: FleetSize, config: EngineConfig) -> dict[str, Any]:
    """Of replicas, as Ray Serve takes it."""
    if size.max_replicas is None:
        return {"num_replicas": size.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": size.num_replicas,
            "initial_replicas": size.num_replicas,
            "max_replicas": size.max_replicas,
            # Its events, which are followed all the time, are a request to Ray.
            "target_ongoing_requests": 1 + config.max_running * TARGET_SHARE,
            "upscale_delay_s": UPSCALE_S,
            "downscale_delay_s": DOWNSCALE_S,
            "look_back_period_s": LOOK_BACK_S,
        }
    }


def _paths() -> list[str]:
    """Where this project's packages are, for processes that start elsewhere."""
    here = str(Path(__file__).resolve().parents[3])
    return [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def spec_of(facts: ReplicaFacts, config: EngineConfig) -> ReplicaSpec:
    """What the router is told of the replicas."""
    return ReplicaSpec(
        PerToken(facts.prefill_tokens_per_s),
        page_size=facts.page_size,
        grid=facts.grid,
        kv_bytes=facts.kv_bytes,
        state_bytes=facts.state_bytes,
        capacity_bytes=facts.capacity_bytes,
        stateful=facts.stateful,
        placement=parse_placement(",".join(config.checkpoints)) if facts.stateful else None,
    )


def is_death(error: Exception) -> bool:
    """Whether a replica went, rather than failed on what it computed."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
