"""Tests of a sweep on Ray: with a stub, and on a cluster if it is installed (``make replicas``)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

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
