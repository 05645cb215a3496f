"""Tests of a sweep on Ray: with a stub, and on a cluster if it is installed (``make replicas``)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hybridcache import simulate

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
        cluster_resources=lambda: {"CPU": 2},
        wait=lambda running: (running[-1:], running[:-1]),
        get=lambda done: done,
    )
    here = [run.token_hit_rate for run in simulate("short", **SWEEP).runs]
    monkeypatch.setitem(sys.modules, "ray", stub)
    far = simulate("short", **SWEEP, ray="somewhere")
    assert [run.token_hit_rate for run in far.runs] == here


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
