"""A simulated run as a page: what it shows is what the simulator found."""

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
def test_a_page_shows_what_was_simulated(trace: str, memory: str) -> None:
    opened = open_trace(trace)
    asked: dict[str, Any] = {"gib": 2.0, "policy": ("lru", "survival"), "memory": memory}
    runs = runs_in(page_of(opened, Sweep(**asked)))
    results = simulate(opened, **asked, bound=False).runs
    assert len(runs) == len(results) == 2
    for run, result in zip(runs, results, strict=True):
        shown = [rest[0] for kind, *rest in run["records"] if kind == "request"]
        assert len(shown) == result.requests
        assert sum(one["prompt"] for one in shown) == result.prompt_tokens
        assert sum(one["cached"] for one in shown) == result.cached_tokens
        assert result.losses is not None
        for cause, tokens in result.losses._asdict().items():
            assert sum(one["losses"][cause] for one in shown) == tokens, cause
        nodes: dict[int, dict[str, Any]] = {}
        follow(nodes, run["records"])
        [*_, memory_now] = [rest[0] for kind, *rest in run["records"] if kind == "memory"]
        assert sum(node["end"] - node["start"] for node in nodes.values()) == memory_now["kv"][1]
        assert sum(node["slot"] is not None for node in nodes.values()) == memory_now["slots"][1]
        assert any(kind == "slabs" for kind, *_ in run["records"]) == (memory == "arena")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"baseline": "vllm"}, "leave --baseline out"),
        ({"max_running": 4}, "leave --max-running out"),
        ({"gib": "1:9:9"}, "these are 9"),
    ],
)
def test_what_a_page_can_not_show_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        page_of(open_trace("short?head=5"), Sweep(**({"gib": 1.0} | options)))


def test_a_run_too_long_for_a_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_RECORDS", 100)
    with pytest.raises(ValueError, match="shorten the trace"):
        page_of(open_trace("short"), Sweep(gib=1.0))


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "run.html"
    asked = ["simulate", "--trace", "short?head=20", "--gib", "2", "--page", str(page)]
    assert main(asked) == 0
    [run] = runs_in(page.read_text())
    assert run["meta"]["title"] == "survival, 2 GiB" and run["meta"]["trace"].startswith("short")
    assert main([*asked, "--trace", "branch"]) == 2
    assert "one trace" in capsys.readouterr().err
