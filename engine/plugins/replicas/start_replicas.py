"""Starts replicas on Ray Serve, and creates the server's client for them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.async_engine import AsyncEngine
from engine.config import ConfigError, EngineConfig
from engine.hub import resolve_config
from engine.plugins.replicas import ROUTER, ReplicasConfig
from engine.plugins.replicas.fleet import FLEETS, Fleet, Order
from engine.plugins.replicas.replicas_client import FleetChannel
from engine.server.settings import ServerConfig
from engine.worker.screen import screen_text
from hybridcache.command.signals import end_by_exception
from hybridcache.routing.registry import find_router

START_S = 600.0
"""Maximum seconds for the replicas to load their models."""
BESIDE_REQUESTS = 64
"""Maximum number of other calls to a replica in addition to requests: its events and reports."""


def start_replicas(
    config: EngineConfig, server: ServerConfig, address: str
) -> tuple[AsyncEngine, str]:
    """Start engines of ``config`` on a Ray cluster, with one core each, and one GPU if there are
    enough, and wait until all have loaded.

    Returns (the engines, the start screen). A replica that is no longer needed has ``drain_s`` to
    finish its requests. Raises ConfigError for settings of an engine that replicas do not support,
    and ValueError for a router or cluster that does not exist, or too few cores or GPUs.
    """
    settings = server.of(ReplicasConfig)
    for is_set, flag in (
        (config.uses("disaggregation"), "--role"),
        (config.kept_folder is not None, "--state-dir"),
        (config.num_ranks > 1, "--tp"),
    ):
        if is_set:
            raise ConfigError(f"--replicas and {flag} cannot be combined: remove one of them.")
    config, make_router = resolve_config(config), find_router(settings.router or ROUTER)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    is_ours = _join_ray(settings.ray)
    try:
        needs = needed(config, settings.replicas, ray.cluster_resources())
    except ValueError:
        if is_ours:
            ray.shutdown()
        raise
    name = f"engine-{os.getpid()}"  # Distinguishes the fleets of one cluster.
    fleet = FLEETS[name] = Fleet()

    def shut_down() -> None:
        FLEETS.pop(name, None)
        serve.delete(name)
        if is_ours:
            serve.shutdown()
            ray.shutdown()

    try:
        handle = _run(config, settings.replicas, name, server.drain_s, needs)
        asked = handle.options(method_name="facts").remote(Order(address=address))
        facts = asked.result(timeout_s=START_S)
        fleet.begin(make_router(facts.spec))
        engine = AsyncEngine(FleetChannel(config, handle, fleet, facts, shut_down, is_death))
    except BaseException:
        shut_down()
        raise
    model, *of_each = facts.screen
    each = "one core and one GPU each" if "num_gpus" in needs else "one core each"
    words = f"{settings.replicas} on Ray Serve, {each}; the facts below are those of one"
    rows = [model, ("replicas", words), ("router", settings.router or ROUTER), *of_each]
    return engine, screen_text(rows)


def needed(
    config: EngineConfig, num_replicas: int, resources: Mapping[str, float]
) -> dict[str, int]:
    """Return what each replica asks of a cluster with these ``resources``. A replica sees only GPUs
    that it has asked for. Raises ValueError if there are too few cores, or GPUs for ``--device``.

    >>> needed(EngineConfig(), 2, {"CPU": 8.0}), needed(EngineConfig(), 2, {"CPU": 8.0, "GPU": 2.0})
    ({'num_cpus': 1}, {'num_cpus': 1, 'num_gpus': 1})
    """
    is_on_gpu = config.device is not None and config.device != "cpu"
    has_gpus = resources.get("GPU", 0) >= num_replicas
    for kind, what in (("CPU", "core"), ("GPU", "GPU")):
        count = int(resources.get(kind, 0))
        if count < num_replicas and (kind == "CPU" or is_on_gpu):
            raise ValueError(
                f"--replicas {num_replicas} need one {what} each, but Ray has {count}: use fewer, "
                "or name a larger cluster with --ray."
            )
    return {"num_cpus": 1} | ({"num_gpus": 1} if has_gpus and config.device != "cpu" else {})


def _join_ray(address: str | None) -> bool:
    """Join a cluster, or start one, and return True if it was started. Raises ValueError if there
    is none at ``address``, or Ray cannot start one."""
    import ray

    if ray.is_initialized():
        return False
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
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
    config: EngineConfig, num_replicas: int, name: str, drain_s: float, needs: Mapping[str, int]
) -> Any:
    """Deploy the replicas without Ray's own HTTP server, which this server replaces."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from engine.plugins.replicas.ray_router import FleetRequestRouter
    from engine.plugins.replicas.replica import EngineReplica

    here = str(Path(__file__).resolve().parents[3])  # Replicas start in another folder.
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    serve.start(proxy_location="Disabled")
    deployment = serve.deployment(
        num_replicas=num_replicas,
        max_ongoing_requests=config.max_queue + config.max_running + BESIDE_REQUESTS,
        ray_actor_options={**needs, "runtime_env": {"env_vars": variables}},
        request_router_config=RequestRouterConfig(
            request_router_class=FleetRequestRouter, request_router_kwargs={"fleet": name}
        ),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.5,
    )(EngineReplica)
    return serve.run(deployment.bind(config), name=name, route_prefix=None)


def is_death(error: Exception) -> bool:
    """Return True if a replica is gone, and False if it failed on a request."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
