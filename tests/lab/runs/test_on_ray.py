"""Tests of a sweep on Ray: with a stub, and on a cluster if it is installed (``make replicas``)."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from hybridcache import simulate
from hybridcache.adapters.routing.protocol import ReplicaSpec, RouteRequest
from hybridcache.lab.rivals.routers import PrefixAffinity
from tests.radix.serving import PerToken

SWEEP = {"model": "qwen3-next", "gib": [1, 4], "policy": ["lru", "survival"]}
COMMAND = ["simulate", "--trace", "short", "--model", "qwen3-next", "--gib", "1,4"]


def test_results_of_ray_tasks_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub runs each task at once and returns the newest first."""

    def remote(**_: int) -> Callable[[Any], Any]:
        return lambda run: SimpleNamespace(remote=lambda *arguments: run(*arguments))

    stub = SimpleNamespace(
        is_initialized=lambda: True,
        init=lambda **_: None,
        put=lambda value: value,
        remote=remote,
        wait=lambda running: (running[-1:], running[:-1]),
        get=lambda done: done,
    )
    here = [run.token_hit_rate for run in simulate("short", **SWEEP).runs]
    monkeypatch.setitem(sys.modules, "ray", stub)
    far = simulate("short", **SWEEP, ray="somewhere")
    assert [run.token_hit_rate for run in far.runs] == here


@pytest.mark.parametrize("said", ["", "invalid authentication token"])
def test_an_address_without_a_cluster_is_one_sentence(monkeypatch, said: str) -> None:
    """Port 9 of this machine is closed; a refusal of Ray comes at a port that is open."""
    stub = Mock(**{"is_initialized.return_value": bool(said)})
    stub.init.side_effect = ConnectionError(said)
    monkeypatch.setitem(sys.modules, "ray", stub)
    with pytest.raises(ValueError, match="refuses the token" if said else "no cluster answers"):
        simulate("short", **SWEEP, ray="127.0.0.1:9")
    assert stub.init.called == bool(said)


def test_ray_cluster_gives_the_same_results() -> None:
    """The cluster is joined by a caller that is already connected, and by a new process."""
    ray = pytest.importorskip("ray")
    start = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    address = start.address_info["gcs_address"]
    try:
        here = [run.token_hit_rate for run in simulate("short", **SWEEP).runs]
        far = simulate("short", **SWEEP, ray=address)
        assert [run.token_hit_rate for run in far.runs] == here
        assert ray.is_initialized(), "the caller's connection must stay open"
        command = [sys.executable, "-m", "hybridcache", *COMMAND]
        outputs = [
            subprocess.run(command + more, capture_output=True, check=True).stdout
            for more in ([], ["--ray", address])
        ]
        assert outputs[0] == outputs[1] and outputs[0]
    finally:
        ray.shutdown()


def test_the_rule_of_prefixes_chooses_as_the_tree_of_ray() -> None:
    place = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree"
    tree, draw = pytest.importorskip(place).PrefixTree(), random.Random(3)
    names, router, earlier = ["a", "b", "c"], PrefixAffinity(ReplicaSpec(PerToken())), [""]
    tree.add_tenants(names, 0.0)
    for name in names:
        router.joined(name, 0.0)
    for number in range(400):
        new = draw.choices("abcdefgh", k=draw.randrange(1, 30))
        text = draw.choice(earlier)[: draw.randrange(40)] + "".join(new)
        earlier.append(text)
        matched, near = tree.prefix_match(text, names)
        if len(matched) < 0.1 * len(text):
            matched, near = "", tree.get_smallest_tenants()
        least = min(router.loads[one].num_running for one in near)
        request = RouteRequest(number, np.array([*map(ord, text)], np.int32))
        choice = router.route(request, float(number))
        assert choice.replica in near and router.loads[choice.replica].num_running == least + 1
        assert choice.expected_len == len(matched)
        tree.insert(text, choice.replica, float(number))
        router.ended(draw.randrange(number + 1), float(number))
