"""Starting replicas on Ray Serve, and the server's view of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engine.config import BUILTIN_NAME, EngineConfig
from engine.fleet.fleet import FLEETS, Fleet
from engine.fleet.front import FleetEngine
from engine.fleet.order import Order, ReplicaFacts
from hybridcache.policies.words import parse_placement
from hybridcache.routing.protocol import ReplicaSpec, Router
from hybridcache.routing.words import find_router

START_S = 600.0
"""How long replicas may take to load their models."""


class PerToken:
    """A constant rate, measured by a replica when it started."""

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s = tokens_per_s

    def seconds(self, start: int, end: int) -> float:
        """To compute tokens [start, end)."""
        return max(end - start, 0) / self._tokens_per_s


def start_fleet(config: EngineConfig, num_replicas: int, router: str, name: str) -> FleetEngine:
    """``num_replicas`` engines of ``config``, a core each, on the Ray cluster that runs here or a
    new one. ``name`` tells fleets of one cluster apart. ValueError: a router that does not exist,
    or too few cores. Waits until all have loaded."""
    make = find_router(router)
    if config.tp > 1:
        raise ValueError(
            f"--replicas are engines of one process each: leave out --tp {config.tp}, or serve one "
            "engine."
        )
    import ray
    from ray import serve

    from engine.fleet.ray_router import FleetRequestRouter
    from engine.fleet.replica import EngineReplica

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False, log_to_driver=False)
    num_cores = int(ray.cluster_resources().get("CPU", 0))
    if num_cores < num_replicas:
        if is_ours:
            ray.shutdown()
        raise ValueError(
            f"--replicas {num_replicas} want a core each, and Ray has {num_cores} here: lower it, "
            "or join more machines with `ray start`."
        )
    found: list[FleetEngine] = []
    facts: list[ReplicaFacts] = []

    def make_router() -> Router:
        return make(spec_of(facts[0], config))

    def on_join(replica: str) -> None:
        if found:
            found[0].joined(replica)

    fleet = FLEETS[name] = Fleet(make_router, on_join)

    def shut_down() -> None:
        FLEETS.pop(name, None)
        serve.delete(name)
        if is_ours:
            serve.shutdown()
            ray.shutdown()

    try:
        handle = _run(serve, EngineReplica, FleetRequestRouter, config, num_replicas, name)
        facts.append(handle.options(method_name="facts").remote(Order()).result(START_S))
        fleet.begin()
    except BaseException:
        shut_down()
        raise
    model = Path(config.model).resolve().name if config.model else BUILTIN_NAME
    found.append(FleetEngine(config, handle, fleet, facts[0], model, shut_down, is_death))
    return found[0]


def _run(
    serve: Any, replica: Any, router: Any, config: EngineConfig, num_replicas: int, name: str
) -> Any:
    """Deploy, without Ray's own HTTP server: ours is in front."""
    from ray.serve.config import RequestRouterConfig

    serve.start(proxy_location="Disabled")
    threads = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_paths())}}
    deployment = serve.deployment(
        num_replicas=num_replicas,
        max_ongoing_requests=config.max_queue + config.max_running,
        ray_actor_options={"num_cpus": 1, "runtime_env": threads},
        request_router_config=RequestRouterConfig(
            request_router_class=router, request_router_kwargs={"fleet": name}
        ),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=1,
    )(replica)
    return serve.run(deployment.bind(config), name=name, route_prefix=None)


def _paths() -> list[str]:
    """Where this project's packages are, for processes that start elsewhere."""
    here = str(Path(__file__).resolve().parents[2])
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
