"""Starts replicas on Ray Serve, and creates the server's client for them."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

from engine.async_engine import AsyncEngine
from engine.config import BUILTIN_NAME, ConfigError, EngineConfig
from engine.hub import resolve_config
from engine.plugins.replicas import ReplicasConfig
from engine.plugins.replicas.fleet import FLEETS, Fleet
from engine.plugins.replicas.replica_output import Order
from engine.plugins.replicas.replicas_client import FleetChannel
from engine.server.settings import ServerConfig
from engine.worker.screen import screen_text
from hybridcache.command.signals import end_by_exception
from hybridcache.routing.registry import find_router


def start_replicas(
    config: EngineConfig, server: ServerConfig, address: str
) -> tuple[AsyncEngine, str]:
    """Return (replicas that have loaded, the start screen). Raises ConfigError for settings of an
    engine that replicas do not support."""
    settings = server.of(ReplicasConfig)
    if config.uses("disaggregation"):
        raise ConfigError(
            f"--replicas {settings.replicas} and --role cannot be combined: start one server for "
            "each role, without --replicas."
        )
    if config.kept_folder is not None:
        raise ConfigError(
            f"--replicas {settings.replicas} and --state-dir {config.kept_folder} cannot be "
            "combined, because a folder belongs to one engine: remove one of them."
        )
    config = resolve_config(config)
    name = f"engine-{os.getpid()}"
    fleet = start_fleet(config, settings, settings.router, name, server.drain_s, address)
    facts = fleet.replica_facts
    model, *of_each = facts.screen
    rows = [
        model,
        (
            "replicas",
            f"{settings.replicas} on Ray Serve, one core each; the facts below are those of one",
        ),
        ("router", settings.router),
        ("prefill", f"{facts.tokens_per_s:,.0f} tokens/s, measured"),
        *of_each,
    ]
    return AsyncEngine(fleet), screen_text(rows)


START_S = 600.0
"""Maximum seconds for the replicas to load their models."""
BESIDE_REQUESTS = 64
"""Maximum number of other calls to a replica in addition to requests: its events and reports."""


def start_fleet(
    config: EngineConfig,
    size: ReplicasConfig,
    router: str,
    name: str,
    drain_s: float = 30.0,
    address: str = "",
) -> FleetChannel:
    """Start engines of ``config``, with one core each, on a Ray cluster, and wait until all have
    loaded.

    ``name`` distinguishes the fleets of one cluster. A replica that is no longer needed has
    ``drain_s`` to finish its requests. Raises ValueError for a router or cluster that
    does not exist, or too few cores.
    """
    make = find_router(router)
    if config.num_ranks > 1:
        raise ValueError(
            "--replicas are engines of one process each: remove --tp "
            f"{config.num_ranks}, or serve one engine."
        )
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    from engine.plugins.replicas.ray_router import FleetRequestRouter
    from engine.plugins.replicas.replica import EngineReplica

    is_ours = _join_ray(size.ray)
    num_cores = int(ray.cluster_resources().get("CPU", 0))
    if num_cores < size.replicas:
        if is_ours:
            ray.shutdown()
        raise ValueError(
            f"--replicas {size.replicas} need one core each, but Ray has {num_cores}: "
            "use fewer, or name a larger cluster with --ray."
        )
    fleet = FLEETS[name] = Fleet()

    def shut_down() -> None:
        FLEETS.pop(name, None)
        serve.delete(name)
        if is_ours:
            serve.shutdown()
            ray.shutdown()

    try:
        handle = _run(serve, EngineReplica, FleetRequestRouter, config, size, name, drain_s)
        facts = (
            handle.options(method_name="facts")
            .remote(Order(address=address))
            .result(timeout_s=START_S)
        )
        fleet.begin(make(facts.spec))
    except BaseException:
        shut_down()
        raise
    model = Path(config.model).resolve().name if config.model else BUILTIN_NAME
    return FleetChannel(config, handle, fleet, facts, model, shut_down, is_death)


def _join_ray(address: str | None) -> bool:
    """Join a cluster, or start one, and return True if it was started. Raises ValueError if there
    is none at ``address``, or Ray cannot start one."""
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ValueError(
            f"--ray {address}: no cluster responds: start one with `ray start --head`, or "
            "remove --ray."
        ) from error
    except Exception as error:  # Ray raises errors of many types, for example on a busy machine.
        raise ValueError(f"--replicas: Ray did not start ({error}).") from error
    # Ray's own handler aborts the process with a dump of its stack.
    end_by_exception(signal.SIGTERM)
    return address is None


def _run(
    serve: Any,
    replica: Any,
    router: Any,
    config: EngineConfig,
    size: ReplicasConfig,
    name: str,
    drain_s: float,
) -> Any:
    """Deploy the replicas without Ray's own HTTP server, which this server replaces."""
    from ray.serve.config import RequestRouterConfig

    serve.start(proxy_location="Disabled")
    threads = {"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(_paths())}}
    deployment = serve.deployment(
        num_replicas=size.replicas,
        max_ongoing_requests=config.max_queue + config.max_running + BESIDE_REQUESTS,
        ray_actor_options={"num_cpus": 1, "runtime_env": threads},
        request_router_config=RequestRouterConfig(
            request_router_class=router, request_router_kwargs={"fleet": name}
        ),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.5,
    )(replica)
    return serve.run(deployment.bind(config), name=name, route_prefix=None)


def _paths() -> list[str]:
    """Return the import paths of this project, for processes that start elsewhere."""
    here = str(Path(__file__).resolve().parents[3])
    return [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def is_death(error: Exception) -> bool:
    """Return True if a replica is gone, and False if it failed on a request."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
