"""Tests of HTML pages of simulated runs against the results of the simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hybridcache import simulate
from hybridcache.lab import recording
from hybridcache.lab.cli import main
from hybridcache.lab.recording import page_of
from hybridcache.lab.simulation.simulate import Sweep
from hybridcache.lab.traces import open_trace
from tests.watch.follower import follow


def runs_in(page: str) -> list[dict[str, Any]]:
    text = page.split('id="recording">')[1].split("</script>")[0]
    runs: list[dict[str, Any]] = json.loads(text)["runs"]
    return runs


@pytest.mark.parametrize("trace", ["short", "agent?head=30"])
@pytest.mark.parametrize("memory", ["arena", "budget"])
def test_page_contains_the_results_of_the_simulation(trace: str, memory: str) -> None:
    opened = open_trace(trace)
    options: dict[str, Any] = {"gib": 2.0, "policy": ("lru", "survival"), "memory": memory}
    runs = runs_in(page_of(opened, Sweep(**options)))
    results = simulate(opened, **options, bound=False).runs
    assert len(runs) == len(results) == 2
    for run, result in zip(runs, results, strict=True):
        requests = [rest[0] for kind, *rest in run["records"] if kind == "request"]
        assert len(requests) == result.requests
        assert sum(one["prompt"] for one in requests) == result.prompt_tokens
        assert sum(one["cached"] for one in requests) == result.cached_tokens
        assert result.losses is not None
        for cause, tokens in result.losses._asdict().items():
            assert sum(one["losses"][cause] for one in requests) == tokens, cause
        nodes: dict[int, dict[str, Any]] = {}
        follow(nodes, run["records"])
        [*_, memory_now] = [rest[0] for kind, *rest in run["records"] if kind == "memory"]
        assert sum(node["end"] - node["start"] for node in nodes.values()) == memory_now["kv"][1]
        assert sum(node["slot"] is not None for node in nodes.values()) == memory_now["slots"][1]
        assert any(kind == "slabs" for kind, *_ in run["records"]) == (memory == "arena")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "vllm"}, "leave baseline out"),
        ({"max_running": 4}, "leave max_running out"),
        ({"gib": "1:9:9"}, "these are 9"),
    ],
)
def test_options_that_a_page_does_not_support_are_rejected(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        page_of(open_trace("short?head=5"), Sweep(**({"gib": 1.0} | options)))


def test_run_too_long_for_a_page_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_RECORDS", 100)
    with pytest.raises(ValueError, match="shorten the trace"):
        page_of(open_trace("short"), Sweep(gib=1.0))


def test_simulate_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "run.html"
    command = ["simulate", "--trace", "short?head=20", "--gib", "2", "--page", str(page)]
    assert main(command) == 0
    [run] = runs_in(page.read_text())
    assert run["meta"]["title"] == "survival, 2 GiB" and run["meta"]["trace"].startswith("short")
    assert main([*command, "--trace", "branch"]) == 2
    assert "one trace" in capsys.readouterr().err
