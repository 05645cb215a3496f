"""Test of a sweep on Ray, if it is installed: ``make replicas``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hybridcache import simulate

ray = pytest.importorskip("ray")
SWEEP = {"model": "qwen3-next", "gib": [1, 4], "policy": ["lru", "survival"]}
COMMAND = ["simulate", "--trace", "short", "--model", "qwen3-next", "--gib", "1,4"]


def test_ray_cluster_gives_the_same_results() -> None:
    """The cluster is joined by a caller that is already connected, and by a new process."""
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
